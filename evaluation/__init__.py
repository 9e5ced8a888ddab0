"""Evaluation: retrieval metrics, baselines, what each modality is worth, and the report.

`metrics` turns scores into Recall@K, NDCG@K and MRR; `baselines` and `head` are what a user could do instead of
training a NoteLLM-2; `modality` takes the text or the image away; `run` puts all of it in one table, and `report`
writes that table down.
"""
