"""Where tasks live: settings, connections and how a statement runs, the start, and the embedded server."""

import asyncio
import gc
import logging
import os
import shutil
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from functools import lru_cache
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import psycopg
from dotenv import load_dotenv
from psycopg.conninfo import conninfo_to_dict
from psycopg.rows import DictRow, dict_row
from sqlalchemy import ClauseElement, Compiled, NullPool, exc
from sqlmodel import SQLModel, create_engine, func, select

from models import Task

if sys.platform != "win32":
    import fcntl

HERE = Path(__file__).resolve().parent
load_dotenv(HERE / ".env", interpolate=False)
DATABASE_URL = os.environ.get("DATABASE_URL", "").strip()

TIMEOUT = 10  # seconds that a request waits for the database
START_PATIENCE = 15  # seconds that a start does

# Neon's smallest compute takes 97 connections: those of two processes, twice while a deploy overlaps.
POOL_SIZE = 20
MAX_AGE = 300  # seconds after which a connection is not used again: its server may have been replaced

KEEPALIVE = {"keepalives_idle": 30, "keepalives_interval": 5, "keepalives_count": 3}  # seconds, not libpq's two hours
# The start adds the URL's. A transaction pooler gives each statement any server: none can be prepared on one.
conninfo: dict[str, Any] = KEEPALIVE | {"connect_timeout": 10, "prepare_threshold": None}
os.environ |= {"PGDATESTYLE": "ISO", "PGTZ": "UTC"}  # which libpq sends, over the database's own settings

logger = logging.getLogger("uvicorn.error")


class StartupError(Exception):
    """Why the app cannot start and what to do about it, in one line without secrets."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        sys.tracebacklimit = 0  # Starlette logs a traceback, where the line says it all


def first_line(error: Exception) -> str:
    """What PostgreSQL adds to an error in further lines may quote a row."""
    return str(error).partition("\n")[0]


# SQLAlchemy's, to compile statements and for the start.
engine = create_engine("postgresql+psycopg://", creator=lambda: psycopg.connect(**conninfo), poolclass=NullPool)

slots = asyncio.Semaphore(POOL_SIZE)
idle: list[tuple[float, psycopg.AsyncConnection[DictRow]]] = []  # and when, by time.monotonic(), they expire
running: set[asyncio.Task[list[DictRow]]] = set()


@lru_cache
def compiled(statement: ClauseElement, *names: str) -> Compiled:
    """For parameters of these names: INSERT and UPDATE set the columns among them."""
    return statement.compile(engine, column_keys=names)


async def run(statement: ClauseElement, /, **values: Any) -> list[DictRow]:
    """The rows that one statement returns. Raises psycopg.Error where the database fails, or has not answered after
    TIMEOUT: the statement is then cancelled, as it is when the caller is."""
    task = asyncio.create_task(execute(compiled(statement, *values), values))
    running.add(task)
    task.add_done_callback(running.discard)
    try:
        # Not wait_for, which also waits for the cancelling: on a frozen server, up to 10 s more.
        await asyncio.wait([task], timeout=TIMEOUT)
        if not task.done():
            raise psycopg.OperationalError(f"no answer within {TIMEOUT} s")
        return task.result()
    finally:
        task.cancel()


async def execute(statement: Compiled, values: dict[str, Any]) -> list[DictRow]:
    async with slots:
        expires, connection = await connect()
        try:
            while True:
                with suppress(psycopg.errors.SerializationFailure, psycopg.errors.DeadlockDetected):
                    cursor = await connection.execute(statement.string, statement.construct_params(values))
                    rows = await cursor.fetchall()
                    break
                await asyncio.sleep(0.01)  # aborted for concurrency, without effect: again
        except BaseException:  # after a failover, say, only a new connection may be of use
            await connection.close()
            raise
        idle.append((expires, connection))
        return rows


async def connect() -> tuple[float, psycopg.AsyncConnection[DictRow]]:
    """An idle connection, or else a new one."""
    while idle:
        expires, connection = idle.pop()
        with suppress(psycopg.OperationalError):
            # Raises where the server has closed it: the first reads its goodbye, the second finds the end. No round trip.
            connection.pgconn.consume_input()
            connection.pgconn.consume_input()
            if time.monotonic() < expires:
                return expires, connection
        await connection.close()
    # In autocommit, because a request is one statement and so one round trip.
    connection = await psycopg.AsyncConnection.connect(**conninfo, autocommit=True, row_factory=dict_row)
    return time.monotonic() + MAX_AGE, connection


@asynccontextmanager
async def open_database(_: object) -> AsyncIterator[None]:
    """The app's lifespan: finds DATABASE_URL's database, and creates a missing table there. Raises StartupError."""
    conninfo.update(parse(embedded_database() if DATABASE_URL == "embedded" else DATABASE_URL))
    await create_tables()
    gc.freeze()  # no collection looks at what is loaded by now
    yield
    await asyncio.gather(*running, return_exceptions=True)  # of requests that the stop has cut off
    while idle:
        await idle.pop()[1].close()


def parse(url: str) -> dict[str, Any]:
    """libpq's parameters out of a PostgreSQL URL. Raises StartupError."""
    scheme, _, rest = url.partition("://")
    if scheme in ("postgres", "postgresql", "postgresql+psycopg"):
        with suppress(psycopg.ProgrammingError):  # whose text may quote the password
            parameters = conninfo_to_dict(f"postgresql://{rest}")
            host, port = str(parameters.get("host", "")), str(parameters.get("port", 5432))
            # Otherwise they are pieces of a password whose @ or / was not percent-encoded, for the log to show.
            if "@" not in host and not port.strip("0123456789,"):
                return parameters | {"client_encoding": "UTF8"}
    problem = "is not a PostgreSQL URL" if url else "is not set"
    raise StartupError(
        f"DATABASE_URL {problem}: set it to postgresql://user:password@host/database, "
        "or to embedded for a private database on this machine"
    )


async def create_tables() -> None:
    """Creates the table unless it is there, and waits for a database that cannot be reached. Raises StartupError."""
    deadline = time.monotonic() + START_PATIENCE
    while True:
        try:
            with engine.begin() as connection:
                # One process at a time, by a number that all have. The lock ends with the transaction,
                # which a transaction pooler keeps on one server; a session's lock would be lost there.
                connection.execute(select(func.pg_advisory_xact_lock(0x7461736B)))
                SQLModel.metadata.create_all(connection)
                connection.execute(select(Task).limit(0))  # fails where an older table has not all columns
            return
        except exc.DBAPIError as error:
            why = first_line(error.orig or error)
            if not isinstance(error, exc.OperationalError) or time.monotonic() > deadline:
                raise StartupError(f"The database of DATABASE_URL cannot be used: {why}") from None
            logger.warning("No database yet: %s", why)
        await asyncio.sleep(1)


# The embedded database: a PostgreSQL of this project's own

FOLDER = HERE / ".postgres"
DATA = FOLDER / "data"
SERVER_USER = "embedded_postgres"  # in place of root, as whom PostgreSQL refuses to run

# Runs beside the app, out of reach of what ends it. Each process of the app has a share of the lock on `users`, which
# the system takes back however the process ends. Who has the lock alone stops the server; who comes then has to wait.
KEEPER = """
import fcntl, pathlib, signal, subprocess
signal.signal(signal.SIGTERM, signal.SIG_IGN)  # of a "killall python", which means the app
server = subprocess.Popen({command!r}, close_fds=False, **{as_user!r})
users = open({users!r})
fcntl.flock(users, fcntl.LOCK_EX)
server.send_signal(signal.SIGINT)  # for PostgreSQL, a fast shutdown
server.wait()
pathlib.Path({sockets!r}).unlink(missing_ok=True)
"""


def embedded_database() -> str:
    """The URL of the server, which ends with the last process that has called this. Raises StartupError."""
    if sys.platform == "win32":
        raise StartupError("DATABASE_URL=embedded needs Linux or macOS: on Windows, run the app in WSL")
    try:
        FOLDER.mkdir(mode=0o700, exist_ok=True)
        # Never closed, so that the share ends with the process.
        fcntl.flock(os.open(FOLDER / "users", os.O_CREAT, 0o600), fcntl.LOCK_SH)
        # A socket's name has some 100 bytes, too few for many a path. No copy shares the folder's number.
        sockets = Path(f"/tmp/tasks-{FOLDER.stat().st_dev:x}-{FOLDER.stat().st_ino:x}")
        new = sockets.with_name(f"{sockets.name}-{os.getpid()}")
        new.symlink_to(DATA)
        new.replace(sockets)  # refused where somebody else made it before
        url = f"postgresql://postgres@/postgres?host={sockets}&port=5432"
        for _ in range(START_PATIENCE * 20):
            start_server(sockets)
            try:
                psycopg.connect(url).close()
                return url
            except psycopg.OperationalError as error:
                why = first_line(error)
            time.sleep(0.05)
    except (OSError, LookupError, ImportError, subprocess.SubprocessError) as error:
        why = first_line(error)
    what_to_do = f"{FOLDER / 'log'} may say more; if the folder is another user's, delete it"
    raise StartupError(f"The embedded database cannot start: {why}: {what_to_do}")


def start_server(sockets: Path) -> None:
    """Starts the server, on new data if there is none, unless it runs, is starting, or has not quite stopped."""
    with open(FOLDER / "server", "a") as lock, open(FOLDER / "log", "a") as log, suppress(BlockingIOError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # The server inherits the lock: who gets it knows that nobody uses the data.
        options: dict[str, Any] = {"pass_fds": [lock.fileno()], "start_new_session": True, "stdout": log, "stderr": log}
        programs = Path(str(distribution("embedded-postgres").locate_file("embedded_postgres/pginstall/bin")))
        as_user: dict[str, Any] = {}
        if os.geteuid() == 0:
            as_user = {"user": SERVER_USER, "group": SERVER_USER, "extra_groups": []}
            subprocess.run(["/usr/sbin/useradd", SERVER_USER], check=False, capture_output=True)  # unless it is there
            shutil.chown(FOLDER, group=SERVER_USER)
            FOLDER.chmod(0o710)
            for folder in (*FOLDER.parents, *programs.resolve().parents):  # a way to its files, not to read others
                folder.chmod(folder.stat().st_mode | 0o001)
        if not DATA.exists():
            new = FOLDER / "new"
            shutil.rmtree(new, ignore_errors=True)
            new.mkdir()
            if as_user:
                shutil.chown(new, SERVER_USER, SERVER_USER)
            initdb = [str(programs / "initdb"), "-U", "postgres", "-E", "UTF8", "--no-locale", "-A", "trust", "-D", "."]
            subprocess.run(initdb, cwd=new, check=True, **options, **as_user)
            new.rename(DATA)
        for stale in ("postmaster.pid", ".s.PGSQL.5432.lock"):  # PostgreSQL believes any process of their number
            (DATA / stale).unlink(missing_ok=True)
        command = [str(programs / "postgres"), "-D", ".", "-k", ".", "-p", "5432", "-c", "listen_addresses="]
        keeper = KEEPER.format(command=command, as_user=as_user, users=str(FOLDER / "users"), sockets=str(sockets))
        subprocess.Popen([sys.executable, "-ISc", keeper], cwd=DATA, **options)
