"""Notes, views and related pairs: load them (`tables`), build pairs from views (`build`), split notes without leaks
(`split`), simulate a world whose best possible result is known (`simulate`)."""
