"""Where the query runs: DuckDB in this process (the default), or Spark on a cluster.

An engine reads logs of views, computes Ibis expressions, and keeps intermediate tables on disk. Everything that differs
between the two is here; what makes two notes related (`pairs.query`) and a view good (`pairs.views`) is written once.

    with connect("duckdb", memory_gb=4) as engine:
        ...
    with connect("spark", spark_master="local[2]") as engine:          # or spark_session=spark
        ...
"""

import csv
import io
import math
import tempfile
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import duckdb
import fsspec
import ibis
import pyarrow as pa
from ibis.expr import types as ir

from pairs.disk import disk_trouble, new_folder

if TYPE_CHECKING:  # Spark is an extra
    from pyspark.sql import DataFrame, SparkSession

EngineName = Literal["duckdb", "spark"]

# Kinds of files, by the endings they may have; compressed ones end in .gz besides.
_KINDS: dict[str, tuple[str, ...]] = {
    "csv": (".csv",),
    "jsonl": (".jsonl", ".ndjson", ".json"),
    "parquet": (".parquet",),
}
_KINDS_HELP = ".csv, .jsonl or .parquet (the first two also with .gz)"


# What columns of our own are called beside those of a log.
_FILE, _CORRUPT = "notellm2_file", "notellm2_corrupt"


class Engine(ABC):
    """What both engines do. Use as a context manager; it takes its temporary files away.

    Attributes:
        name: "duckdb" or "spark".
        backend: the Ibis backend.
        drops_rows_before_it_sorts: whether it keeps only the best rows of each group as it reads them, where a row
            number is to be at most k.
        show_progress: whether long work shows a progress bar.
    """

    name: EngineName
    backend: Any
    drops_rows_before_it_sorts: bool
    show_progress: bool

    @abstractmethod
    def read(self, path: str, columns: tuple[str, str, str]) -> ir.Table:
        """Reads a log of views: one file, several by a pattern (`*`), or a folder, also one partitioned as `day=…/`.

        Args:
            path: a path, or a URL such as s3://bucket/views. CSV files have a header.
            columns: how the table calls user_id, note_id and timestamp.

        Returns:
            user_id, note_id (string), timestamp (string, int64 or timestamp, as the table has it), file (string), block
            and position (int64: rows of a file are in the order of block, then position).

        Raises:
            FileNotFoundError: nothing is there.
            ValueError: a kind of file that is not known, a missing column, a column of a wrong type, CSV files with
                other headers than the first, a row that cannot be parsed.
        """

    @abstractmethod
    def from_arrow(self, table: pa.Table) -> ir.Table:
        """A table in memory as one of the engine."""

    @abstractmethod
    def keep(self, expression: ir.Table, cluster_by: str | None = None) -> ir.Table:
        """Computes `expression` once, and stores the result on disk for as long as the engine is open.

        Args:
            expression: what to compute.
            cluster_by: a column whose equal values should lie side by side, where that makes joins on it faster.
        """

    @abstractmethod
    def number(self, ids: ir.Table, column: str, name: str) -> ir.Table:
        """Adds the integer column `name`, which rises with the string column `column`, whose values are unique.

        The numbers are 0, 1, 2, … (int32) on DuckDB, and have gaps (int64) on Spark. Computed once, as by `keep`.
        """

    def parts_of(self, encounters: int) -> int:
        """In how many parts to count so many encounters, so that the counts of one part fit in memory."""
        return 1

    @abstractmethod
    def fetch(self, expression: ir.Table) -> pa.Table:
        """The result, in memory."""

    def count(self, expression: ir.Table) -> int:
        """The number of rows."""
        return int(self.fetch(expression.aggregate(rows=expression.count()))["rows"][0].as_py())

    @abstractmethod
    def refuse_existing(self, path: str) -> None:
        """Raises ValueError where `write_folder` could not write to `path` because something is there."""

    @abstractmethod
    def write_folder(self, expression: ir.Table, path: str) -> None:
        """Writes the result as Parquet files into a new folder, here or on an object store.

        Raises:
            ValueError: something is at `path` already, or another run is writing there.
            DiskError: the disk is full.
        """

    @abstractmethod
    def close(self) -> None:
        """Takes temporary files away and gives back what the engine opened."""

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def connect(
    engine: EngineName = "duckdb",
    *,
    memory_gb: float = 4.0,
    temp_dir: str | None = None,
    spark_master: str | None = None,
    spark_session: "SparkSession | None" = None,
    show_progress: bool = False,
) -> Engine:
    """Opens an engine.

    Args:
        engine: "duckdb" or "spark".
        memory_gb: DuckDB: memory it may take for its tables, in 10^9 bytes; what does not fit is spilled to disk. The
            process takes a few hundred megabytes more. Spark: memory of a local master's process; a cluster has its own
            settings.
        temp_dir: where intermediate tables go. Spark on a cluster: a folder that all machines reach
            (hdfs://…, s3a://…). None: a folder of this machine.
        spark_master: where Spark runs; None: as `SparkSession.builder` finds it configured (as under spark-submit).
        spark_session: an existing session, which stays open.
        show_progress: whether long work shows a progress bar.

    Raises:
        ValueError: another engine, memory_gb not above 0, or Spark's settings without Spark.
        ImportError: Spark or its Java are not installed.
    """
    if engine not in get_args(EngineName):
        raise ValueError(f"engine={engine!r}: use one of {get_args(EngineName)}.")
    if not memory_gb > 0:
        raise ValueError(f"memory_gb={memory_gb}: give a number above 0.")
    if engine == "duckdb":
        if spark_master is not None or spark_session is not None:
            raise ValueError(f"spark_master={spark_master!r} needs engine='spark'.")
        return DuckDBEngine(memory_gb, temp_dir, show_progress)
    return SparkEngine(spark_master, spark_session, memory_gb, temp_dir, show_progress)


class DuckDBEngine(Engine):
    """DuckDB in this process, with a database file for what does not fit in memory."""

    name = "duckdb"
    drops_rows_before_it_sorts = False

    def __init__(self, memory_gb: float, temp_dir: str | None, show_progress: bool) -> None:
        # A database of its own for every engine, and nothing left of it: these are no tables that anybody shall find.
        self._folder = tempfile.TemporaryDirectory(prefix="notellm2-pairs-", dir=temp_dir)
        folder = Path(self._folder.name)
        self._memory_gb = memory_gb
        with self._errors():
            self.backend = ibis.duckdb.connect(
                folder / "views.duckdb",
                memory_limit=f"{memory_gb}GB",
                temp_directory=str(folder / "spill"),
                # Tables have no order of rows that anything relies on; keeping one costs memory.
                preserve_insertion_order=False,
            )
            self.backend.raw_sql("SET TimeZone = 'UTC'")
        self.show_progress = show_progress

    def read(self, path: str, columns: tuple[str, str, str]) -> ir.Table:
        filesystem, files = _list_files(path)
        kind = _kind_of(path, files)
        self._register(filesystem)
        names = "[" + ", ".join(map(_quoted, files)) + "]"
        options = f"filename = '{_FILE}', hive_partitioning = true, hive_types_autocast = false"
        position, there = "row_number() OVER ()", list(columns)
        if kind == "parquet":
            source = f"read_parquet({names}, {options}, union_by_name = true, file_row_number = true)"
            position = "file_row_number"
        elif kind == "csv":
            # All is said, as what DuckDB guesses may skip the header or a row.
            there = _csv_header(path, filesystem, files, columns)
            # Only the columns that are wanted need names of their own: others may have none, or one for several.
            given = {name if name in columns else f"unused {place}": "VARCHAR" for place, name in enumerate(there)}
            dialect = "auto_detect = false, header = true, skip = 0, delim = ',', quote = '\"', escape = '\"'"
            source = f"read_csv({names}, {options}, {dialect}, columns = {_struct(given)})"
        else:
            given = dict.fromkeys(columns, "VARCHAR")
            source = f"read_json({names}, {options}, format = 'newline_delimited', columns = {_struct(given)})"
        schema = dict(self._sql(f"DESCRIBE SELECT * FROM {source}", path, rows=True))
        if kind == "parquet":
            there = [name for name in schema if name not in (_FILE, "file_row_number")]
        _check_columns(path, columns, schema, there)
        user, note, time = ('"' + name.replace('"', '""') + '"' for name in columns)
        query = (
            f"SELECT {user}::VARCHAR AS user_id, {note}::VARCHAR AS note_id, {time} AS timestamp, {_FILE} AS file, "
            f"0::BIGINT AS block, ({position})::BIGINT AS position FROM {source}"
        )
        if kind == "parquet":  # columns apart, it is read as often as it is needed
            return self.backend.sql(query)
        # A text is parsed once; the number of a row is known only then, and only in the order of the file.
        name = _new_name()
        self.backend.raw_sql("SET preserve_insertion_order = true")
        self._sql(f'CREATE TABLE "{name}" AS {query}', path)
        self.backend.raw_sql("SET preserve_insertion_order = false")
        return self.backend.table(name)

    def _sql(self, query: str, path: str, rows: bool = False) -> list[tuple[Any, ...]]:
        try:
            cursor = self.backend.raw_sql(query)
            return [row[:2] for row in cursor.fetchall()] if rows else []
        except duckdb.Error as error:
            if disk_trouble(error) is not None:  # of the intermediate tables
                with self._errors():
                    raise
            raise ValueError(f"{path}: not readable ({_gist(error)}); repair or convert it.") from error

    def _register(self, filesystem: fsspec.AbstractFileSystem) -> None:
        names = _protocols(filesystem)
        if "file" not in names and not any(map(self.backend.con.filesystem_is_registered, names)):
            self.backend.register_filesystem(filesystem)

    def from_arrow(self, table: pa.Table) -> ir.Table:
        with self._errors():
            return self.backend.create_table(_new_name(), table)

    def keep(self, expression: ir.Table, cluster_by: str | None = None) -> ir.Table:
        # A hash join of rows that lie as their keys do is four times as fast: the processor's cache holds what it
        # needs.
        ordered = expression if cluster_by is None else expression.order_by(cluster_by)
        with self._errors():
            return self.backend.create_table(_new_name(), ordered)

    def parts_of(self, encounters: int) -> int:
        # Measured on a power law of popularity: a fifth as many pairs as encounters, 40 to 80 bytes each in a hash
        # table.
        return max(1, math.ceil(encounters * 16 / (self._memory_gb * 0.5e9)))

    def number(self, ids: ir.Table, column: str, name: str) -> ir.Table:
        number = ibis.row_number().over(order_by=column).cast("int32")
        return self.keep(ids.mutate(number.name(name)))

    def fetch(self, expression: ir.Table) -> pa.Table:
        with self._errors():
            return expression.to_pyarrow()

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except duckdb.Error as error:
            raise ValueError(
                f"DuckDB cannot compute this ({_gist(error)}); where memory or disk is short, see memory_gb="
                f"{self._memory_gb} and temp_dir, and bound the work with min_count, min_note_users or max_user_views."
            ) from error

    def refuse_existing(self, path: str) -> None:
        filesystem, target = fsspec.core.url_to_fs(path)
        if filesystem.exists(target):
            raise ValueError(f"{path}: is there already; remove it or give another path.")

    def write_folder(self, expression: ir.Table, path: str) -> None:
        self.refuse_existing(path)
        filesystem, target = fsspec.core.url_to_fs(path)
        self._register(filesystem)
        if "file" not in _protocols(filesystem):
            target = filesystem.unstrip_protocol(target)
            filesystem.makedirs(target, exist_ok=True)
            with self._errors():
                expression.to_parquet(f"{target}/part-0.parquet")
            return
        with new_folder(target) as folder, self._errors():
            expression.to_parquet(folder / "part-0.parquet")

    def close(self) -> None:
        # Ctrl-C ends the call, not always the query, whose end disconnecting waits for.
        self.backend.con.interrupt()
        self.backend.disconnect()
        self._folder.cleanup()


class SparkEngine(Engine):
    """Spark. Intermediate tables are Parquet files: unlike a cache, no lost machine makes Spark compute them anew."""

    name = "spark"
    drops_rows_before_it_sorts = True  # WindowGroupLimit

    def __init__(
        self,
        master: str | None,
        session: "SparkSession | None",
        memory_gb: float,
        temp_dir: str | None,
        show_progress: bool,
    ) -> None:
        try:
            from pyspark.sql import SparkSession
        except ImportError as error:
            raise ImportError(
                "engine='spark' needs PySpark 4 and Java 17: pip install 'notellm2[spark]', or -e '.[spark]' in a "
                "checkout."
            ) from error
        self.show_progress = show_progress
        running = SparkSession.getActiveSession() if session is None else session
        self._opened = running is None
        if running is None:
            running = _new_session(master, memory_gb, show_progress)
        elif master is not None and master != running.conf.get("spark.master", None):
            raise ValueError(
                f"spark_master={master!r}: a session on {running.conf.get('spark.master', None)!r} is open in this "
                "process; stop it, or leave spark_master out to use it."
            )
        if not hasattr(running, "_jvm"):
            raise ValueError("spark_session: a Spark Connect session cannot be used; give a session of its driver.")
        self.session = running
        self._stack = ExitStack()
        where = running.conf.get("spark.master", None) or ""
        is_shared = temp_dir is not None and "://" in temp_dir and not temp_dir.startswith("file:")
        if not (where.startswith("local") or is_shared):
            # Each machine would write its part to a disk of its own, and what is read back would lack rows.
            raise ValueError(
                f"temp_dir={temp_dir!r}: Spark on {where!r} needs a folder that all its machines reach, such as "
                "hdfs:///tmp/pairs or s3a://bucket/tmp."
            )
        # A user's own session gets its settings back.
        wanted = {
            "spark.sql.session.timeZone": "UTC",  # whatever the cluster's zone
            "spark.sql.sources.partitionColumnTypeInference.enabled": "false",  # an id 007 in a path stays one
            "spark.sql.mapKeyDedupPolicy": "LAST_WIN",  # Ibis sets it
        }
        self._stack.enter_context(_settings(self.session, wanted))
        if temp_dir is None:
            temp_dir = self._stack.enter_context(tempfile.TemporaryDirectory(prefix="notellm2-pairs-"))
        self._temp_dir = f"{temp_dir.rstrip('/')}/{_new_name()}"
        self._views: list[str] = []
        self.backend = ibis.pyspark.connect(self.session)

    def read(self, path: str, columns: tuple[str, str, str]) -> ir.Table:
        from pyspark.sql import functions as F

        files = _spark_files(self.session, path)
        kind = _kind_of(path, files)
        with _spark_errors(path):
            reader = self.session.read.option("columnNameOfCorruptRecord", _CORRUPT)
            if kind == "parquet":
                frame = reader.parquet(path)
            elif kind == "csv":
                # Several files are only read where their headers are alike.
                reader = reader.options(header=True, quote='"', escape='"', enforceSchema=len(files) == 1)
                frame = reader.csv(path)
                if frame.columns:
                    frame = reader.schema(frame.schema.add(_CORRUPT, "string")).csv(path)
            else:
                frame = reader.schema(", ".join(f"`{name}` STRING" for name in (*columns, _CORRUPT))).json(path)
        schema = {field.name: field.dataType.simpleString() for field in frame.schema if field.name != _CORRUPT}
        _check_columns(path, columns, schema, list(schema))
        user, note, time = (F.col(f"`{name}`") for name in columns)
        # Spark spells a path as a URL.
        file = F.url_decode(F.replace(F.col("_metadata.file_path"), F.lit("+"), F.lit("%2B")))
        place = {
            "file": F.regexp_replace(file, "^file:/*", "/"),
            "block": F.lit(0).cast("long") if kind == "parquet" else F.col("_metadata.file_block_start"),
            "position": F.col("_metadata.row_index") if kind == "parquet" else F.monotonically_increasing_id(),
        }
        views = {"user_id": user.cast("string"), "note_id": note.cast("string"), "timestamp": time, **place}
        chosen = [column.alias(name) for name, column in views.items()]
        if kind == "parquet":  # columns apart, it is read as often as it is needed
            return self._from_frame(frame.select(chosen))
        # A text is parsed once.
        with _spark_errors(path):
            parsed = self._store(frame.select(*chosen, F.col(_CORRUPT)))
        corrupt = parsed.filter(F.col(_CORRUPT).isNotNull()).orderBy("file", "block", "position").limit(1).collect()
        if corrupt:
            in_block = (F.col("block") == corrupt[0].block) & (F.col("position") < corrupt[0].position)
            earlier = (F.col("file") == corrupt[0].file) & ((F.col("block") < corrupt[0].block) | in_block)
            row = parsed.filter(earlier).count() + 1
            raise ValueError(
                f"{path}: not readable ({corrupt[0].file}, row {row}: {corrupt[0][_CORRUPT].strip()[:300]!r}); "
                "repair or convert it."
            )
        return self._from_frame(parsed.drop(_CORRUPT))

    def _frame(self, expression: ir.Table) -> "DataFrame":
        return self.session.sql(self.backend.compile(expression))

    def _from_frame(self, frame: "DataFrame") -> ir.Table:
        name = _new_name()
        frame.createOrReplaceTempView(name)
        self._views.append(name)
        return self.backend.table(name)

    def _store(self, frame: "DataFrame") -> "DataFrame":
        path = f"{self._temp_dir}/{_new_name()}"
        frame.write.parquet(path)
        return self.session.read.schema(frame.schema).parquet(path)  # known, so that no job has to find it out

    def from_arrow(self, table: pa.Table) -> ir.Table:
        return self._from_frame(self._store(self.session.createDataFrame(table)))

    def keep(self, expression: ir.Table, cluster_by: str | None = None) -> ir.Table:
        with self._errors():
            return self._from_frame(self._store(self._frame(expression)))

    def _errors(self) -> AbstractContextManager[None]:
        return _spark_errors("Spark", "cannot compute this", "its log says more; is memory or disk short?")

    def fetch(self, expression: ir.Table) -> pa.Table:
        # Ibis would go through pandas, which takes more memory and makes floating-point numbers of integers with nulls.
        with self._errors():
            return self._frame(expression).toArrow().cast(expression.schema().to_pyarrow())

    def number(self, ids: ir.Table, column: str, name: str) -> ir.Table:
        from pyspark.sql import functions as F

        # A sort gives each partition a range of ids, and the numbers rise from partition to partition: no single
        # machine has to see all ids, as the window function of a row number would want.
        frame = self._frame(ids).orderBy(column).withColumn(name, F.monotonically_increasing_id())
        with self._errors():
            return self._from_frame(self._store(frame))

    def refuse_existing(self, path: str) -> None:
        filesystem, target = self._hadoop(path)
        if filesystem.exists(target):
            raise ValueError(f"{path}: is there already; remove it or give another path.")

    def write_folder(self, expression: ir.Table, path: str) -> None:
        self.refuse_existing(path)
        with _spark_errors(path, "cannot be written", "may this user write there?"):
            self._frame(expression).write.parquet(path)

    def _hadoop(self, path: str) -> tuple[Any, Any]:
        """Hadoop's file system of a path, and the path there."""
        jvm: Any = self.session._jvm
        target = jvm.org.apache.hadoop.fs.Path(path)
        return target.getFileSystem(self.session._jsc.hadoopConfiguration()), target

    def close(self) -> None:
        for name in self._views:
            self.session.catalog.dropTempView(name)
        filesystem, target = self._hadoop(self._temp_dir)
        filesystem.delete(target, True)
        self._stack.close()
        if self._opened:
            self.session.stop()


def _new_session(master: str | None, memory_gb: float, show_progress: bool) -> "SparkSession":
    from pyspark.errors import PySparkRuntimeError
    from pyspark.sql import SparkSession

    builder = SparkSession.builder.appName("notellm2-pairs")
    builder = builder.config("spark.ui.showConsoleProgress", str(show_progress).lower())
    if master is not None:
        builder = builder.master(master)
        if master.startswith("local"):  # everything runs in the driver, and a shuffle need not be wide
            builder = builder.config("spark.driver.memory", f"{int(memory_gb * 1000)}m")
            builder = builder.config("spark.driver.host", "127.0.0.1").config("spark.ui.enabled", "false")
            builder = builder.config("spark.driver.bindAddress", "127.0.0.1")
            builder = builder.config("spark.sql.shuffle.partitions", "8")
            builder = builder.config("spark.sql.warehouse.dir", tempfile.gettempdir())  # and not a folder made here
    try:
        return builder.getOrCreate()
    except PySparkRuntimeError as error:
        raise ImportError(
            f"engine='spark': Spark does not start ({str(error).splitlines()[0]}); it needs Java 17, see JAVA_HOME."
        ) from error


def _new_name() -> str:
    return f"notellm2_{uuid.uuid4().hex}"


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _struct(values: dict[str, str]) -> str:
    return "{" + ", ".join(f"{_quoted(name)}: {_quoted(value)}" for name, value in values.items()) + "}"


def _protocols(filesystem: fsspec.AbstractFileSystem) -> tuple[str, ...]:
    return (filesystem.protocol,) if isinstance(filesystem.protocol, str) else tuple(filesystem.protocol)


def _list_files(path: str) -> tuple[fsspec.AbstractFileSystem, list[str]]:
    """The files that `path` stands for, by name; as URLs where they are not on this machine."""
    try:
        filesystem, root = fsspec.core.url_to_fs(path)
    except (ImportError, ValueError) as error:
        raise ValueError(f"{path}: no file system for this URL ({error}).") from error
    if any(sign in root for sign in "*?[") and not filesystem.exists(root):
        found = filesystem.glob(root)
    elif filesystem.isdir(root):
        found = filesystem.find(root)
        # As Spark does: what begins with _ or . is no data, such as _SUCCESS.
        start = len(root.rstrip("/"))
        found = [name for name in found if not any(part[:1] in "_." for part in name[start:].split("/") if part)]
    else:
        found = [root] if filesystem.exists(root) else []
    if not found:
        raise _nothing_at(path)
    found = sorted(found)
    return filesystem, found if "file" in _protocols(filesystem) else list(map(filesystem.unstrip_protocol, found))


def _nothing_at(path: str) -> FileNotFoundError:
    return FileNotFoundError(f"{path}: no such file or folder, or nothing in it; give files in {_KINDS_HELP}.")


def _csv_header(
    path: str, filesystem: fsspec.AbstractFileSystem, files: list[str], columns: tuple[str, str, str]
) -> list[str]:
    """The header that all CSV files share; files of no bytes have none."""
    header: list[str] = []
    first = ""
    for name in files:
        with filesystem.open(name, compression="infer") as raw:
            line = next(csv.reader(io.TextIOWrapper(raw, "utf-8-sig", errors="replace", newline="")), None)
        if line is None:
            continue
        if first and line != header:
            raise ValueError(f"{path}: the header of {name} is {line}, that of {first} {header}; write all alike.")
        header, first = line, name
    for wanted in columns:
        if header.count(wanted) > 1:
            raise ValueError(f"{path}: several columns {wanted!r} in {header}; rename all but one.")
    return header


def _gist(error: duckdb.Error) -> str:
    """What DuckDB says of a file and a line in it; the rest of its long text is about options that are ours."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    files = [line for line in lines if line.startswith("file = ")]
    said = list(takewhile(lambda line: not line.startswith(("Possible", "Try setting")), lines))
    return "; ".join(line[:300] for line in [*said[:2], *said[2:][-1:], *files])


def _spark_files(session: "SparkSession", path: str) -> list[str]:
    """The files that `path` stands for, as Spark's own file systems list them."""
    from pyspark.errors import AnalysisException

    frame = session.read.format("binaryFile").option("recursiveFileLookup", "true")
    try:
        with _spark_errors(path):
            files = list(frame.load(path).inputFiles())
    except ValueError as error:
        if isinstance(error.__cause__, AnalysisException):
            raise _nothing_at(path) from error
        raise
    if not files:
        raise _nothing_at(path)
    return files


@contextmanager
def _spark_errors(about: str, what: str = "not readable", remedy: str = "repair or convert it.") -> Iterator[None]:
    """Makes one line of the errors that come from a JVM with its stack."""
    from py4j.protocol import Py4JError
    from pyspark.errors import PySparkException

    try:
        yield
    except (PySparkException, Py4JError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        causes = [line for line in lines if line.startswith(("Caused by:", ": "))]
        said = "; ".join(line[:300] for line in [*lines[:1], *causes[-1:]])
        raise ValueError(f"{about}: {what} ({said}); {remedy}") from error


def _kind_of(path: str, files: list[str]) -> str:
    kinds = set()
    for name in files:
        plain = name.removesuffix(".gz")
        kind = next((kind for kind, endings in _KINDS.items() if plain.endswith(endings)), None)
        if kind is None:
            raise ValueError(f"{path}: {name} is of an unknown kind; give files in {_KINDS_HELP}.")
        kinds.add(kind)
    if len(kinds) > 1:
        raise ValueError(f"{path}: holds files of several kinds ({', '.join(sorted(kinds))}); give one kind.")
    return kinds.pop()


def _check_columns(path: str, columns: tuple[str, str, str], schema: dict[str, str], there: list[str]) -> None:
    """Refuses missing columns, ids that are no texts or integers, and times that are no texts, integers or timestamps.

    Args:
        path: what errors name.
        columns: the columns that are wanted.
        schema: the type of every column, as the engine calls it.
        there: the columns to name where one is missing.
    """
    for place, name in enumerate(columns):
        if name not in schema:
            raise ValueError(f"{path}: no column {name!r}, only {there}; say which one it is with an option.")
        kind = schema[name].lower()
        text_or_integer = kind.endswith("int") or kind in ("varchar", "string", "integer", "ubigint", "uinteger")
        is_time = place == 2 and (kind.startswith("timestamp") or kind == "date")
        if not (text_or_integer or is_time):
            wanted = "integers, ISO 8601 texts or timestamps" if place == 2 else "texts or integers"
            raise ValueError(f"{path}: column {name!r} is {schema[name]}; give {wanted}.")


@contextmanager
def _settings(session: "SparkSession", wanted: dict[str, str]) -> Iterator[None]:
    before = {name: session.conf.get(name, None) for name in wanted}
    for name, value in wanted.items():
        session.conf.set(name, value)
    try:
        yield
    finally:
        for name, old in before.items():
            session.conf.unset(name) if old is None else session.conf.set(name, old)


__all__ = ["DuckDBEngine", "Engine", "EngineName", "SparkEngine", "connect"]
