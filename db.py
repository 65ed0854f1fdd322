"""Where tasks live: the database's URL, its engine, its table, and how a statement runs."""

import asyncio
import errno
import gc
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager, nullcontext, suppress
from importlib.metadata import distribution
from pathlib import Path
from typing import Any
from weakref import WeakSet

import psycopg
from dotenv import load_dotenv
from psycopg.conninfo import conninfo_to_dict
from sqlalchemy import ExceptionContext, Executable, event, exc
from sqlmodel import create_engine, func, select

from models import Task

HERE = Path(__file__).resolve().parent
load_dotenv(HERE / ".env", interpolate=False)
DATABASE_URL = os.environ.get("DATABASE_URL", "").strip()

TIMEOUT = 10  # seconds that a request waits for the database

# Seconds. libpq would notice a network that drops packets after hours.
KEEPALIVE = {"connect_timeout": 10, "keepalives_idle": 30, "keepalives_interval": 5, "keepalives_count": 3}

# What a database's own settings may not change. A transaction pooler gives each statement any
# server: none can be prepared on one.
SESSION = {"client_encoding": "UTF8", "prepare_threshold": None}
os.environ["PGDATESTYLE"] = "ISO"  # a parameter that libpq takes from nowhere else

# Neon's smallest compute takes 97 connections: two processes, and two more while a deploy overlaps.
POOL_SIZE = 20

START_PATIENCE = 60  # seconds
# Answers that waiting does not change. A failed connection has no error code, only this text.
FINAL = re.compile(
    "(FATAL|ERROR): .*(authentication failed|does not exist|no such (user|database)|no pg_hba.conf entry|unrecognized)"
    r"|invalid (port|\w+ value)"
)

# Of the embedded database.
DATA = HERE / ".postgres"
ROOT = os.name == "posix" and os.geteuid() == 0
SERVER_USER = "embedded_postgres"  # where the app's is root

logger = logging.getLogger("uvicorn.error")


class StartupError(Exception):
    """Why the app cannot start and what to do about it, in one line without secrets."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        sys.tracebacklimit = 0  # Starlette logs a traceback, where the line says it all


def reason(error: Exception) -> str:
    """An error's first line; what PostgreSQL adds to it may quote a row."""
    return str(getattr(error, "orig", None) or error).partition("\n")[0]


class Connection(psycopg.Connection[Any]):
    """Has the server cancel a statement that is not done at `deadline`, a time.monotonic()."""

    deadline = float("inf")

    def wait(self, gen: Any, interval: float = 0.1, timeout: float | None = None) -> Any:
        timeout = self.deadline - time.monotonic()
        if timeout > 0:
            for _ in range(5):  # a pooler may begin a statement after it was asked to cancel it
                with suppress(psycopg.errors._WaitTimeout):
                    return super().wait(gen, interval, timeout)
                timeout = 1
                with suppress(psycopg.Error):
                    self.cancel_safe(timeout=timeout)
            self.close()
        raise psycopg.OperationalError(f"no answer within {TIMEOUT} s")


connection_parameters: dict[str, Any] = {}  # open_database fills them in
connections = WeakSet[Connection]()


def connect() -> Connection:
    connection = Connection.connect(**connection_parameters)
    connections.add(connection)
    encoding = connection.info.parameter_status("server_encoding")
    if encoding not in ("UTF8", None):
        raise psycopg.NotSupportedError(f"its encoding is {encoding}, and must be UTF8")
    return connection


engine = create_engine(
    "postgresql+psycopg://",
    creator=connect,
    isolation_level="AUTOCOMMIT",  # a request is one statement, so one round trip
    pool_size=POOL_SIZE,
    max_overflow=0,
    pool_recycle=300,  # seconds: no connection outlives a failover or a changed setting for long
    skip_autocommit_rollback=True,  # autocommit leaves nothing to roll back
)
threads = ThreadPoolExecutor(POOL_SIZE)  # one for each connection, so that nothing waits for both


async def run(statement: Executable, /, **values: Any) -> list[dict[str, Any]]:
    """The rows that one statement returns.

    Raises SQLAlchemyError where the database fails, or has not answered after TIMEOUT; the statement
    is then cancelled."""
    deadline = time.monotonic() + TIMEOUT
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(TIMEOUT):
            return await loop.run_in_executor(threads, execute, statement, values, deadline)
    except TimeoutError:
        raise exc.TimeoutError(f"no answer within {TIMEOUT} s") from None


def execute(statement: Executable, values: dict[str, Any], deadline: float) -> list[dict[str, Any]]:
    while True:
        with engine.connect() as connection:
            connection.connection.driver_connection.deadline = deadline  # type: ignore[union-attr]
            try:
                found = connection.execute(statement, values)
                keys = found.keys()
                return [dict(zip(keys, row, strict=True)) for row in found]
            except exc.OperationalError as error:
                # Which the database aborted for concurrency, without effect.
                if not isinstance(error.orig, psycopg.errors.SerializationFailure | psycopg.errors.DeadlockDetected):
                    raise
        time.sleep(0.01)


@asynccontextmanager
async def open_database(_: object) -> AsyncIterator[None]:
    """The app's lifespan: binds the engine to DATABASE_URL's database, and creates a missing table there.

    Raises StartupError where DATABASE_URL is wrong or its database out of reach for START_PATIENCE."""
    database = embedded_database() if DATABASE_URL == "embedded" else nullcontext(parse(DATABASE_URL))
    with database as address:
        connection_parameters.update(KEEPALIVE | address | SESSION)
        with signals_heeded():
            create_tables()
        gc.freeze()  # no collection looks at what is loaded by now: a twentieth of a request's CPU
        yield
        engine.dispose()
        for connection in list(connections):  # those still open: shutdown has cut off what they do
            with suppress(psycopg.Error):
                connection.cancel_safe(timeout=1)


@contextmanager
def signals_heeded() -> Iterator[None]:
    """Has a signal end the process at once, during a start that may take long: uvicorn heeds it only afterwards."""
    main = threading.current_thread() is threading.main_thread()
    handlers = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGINT, signal.SIGTERM) if main}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def parse(url: str) -> dict[str, Any]:
    """libpq's parameters out of a PostgreSQL URL. Raises StartupError."""
    scheme, _, rest = url.partition("://")
    if scheme.partition("+")[0] in ("postgres", "postgresql"):
        with suppress(ValueError, psycopg.ProgrammingError):  # whose text may quote the password
            parameters = conninfo_to_dict(f"postgresql://{rest}")
            # An @ in the host is the end of a password that was not percent-encoded.
            if "@" not in str(parameters.get("host")) and re.fullmatch(r"[\d,]*", str(parameters.get("port", ""))):
                return parameters
    problem = "is not a PostgreSQL URL" if url else "is not set"
    raise StartupError(
        f"DATABASE_URL {problem}: set it to postgresql://user:password@host/database, "
        "or to embedded for a private database on this machine"
    )


@contextmanager
def embedded_database() -> Iterator[dict[str, Any]]:
    """Runs a private PostgreSQL on the data in .postgres/, until the last process using it ends.

    Each process holds a shared lock there, which ends with the process however that ends; whoever gets
    the lock alone is the last. Raises StartupError."""
    try:
        with signals_heeded():
            if not DATA.exists():
                make_data()
            # Named by the folder's number, which a copy does not share: its path could be too long for a socket.
            number = f"{DATA.stat().st_dev:x}-{DATA.stat().st_ino:x}"
            sockets = Path("/tmp" if os.name == "posix" else tempfile.gettempdir(), f"tasks-{number}")
            parameters = {"host": str(sockets), "port": 5432, "user": "postgres", "dbname": "postgres"}
            user = start_or_join(sockets, parameters)
    except OSError as error:
        why = f"{error.filename}: {error.strerror}. If it is another user's, start the app as that user, or delete it"
        raise StartupError(f"The embedded database cannot start: {why}") from None
    try:
        yield parameters
    finally:
        with suppress(psycopg.Error, OSError):
            user.execute("SELECT pg_advisory_unlock_shared(0)")
            if user.execute("SELECT pg_try_advisory_lock(0)").fetchone() == (True,):
                postgres("pg_ctl", "stop", folder=DATA)
                sockets.rmdir()


def make_data() -> None:
    """Makes DATA under another name and renames it when it is whole: this may be killed at any time."""
    new = Path(tempfile.mkdtemp(prefix=".postgres-", dir=HERE))
    if ROOT:
        subprocess.run(["useradd", SERVER_USER], check=False, capture_output=True)  # unless there
        shutil.chown(new, SERVER_USER, SERVER_USER)
    if postgres("initdb", "-U", "postgres", "-E", "UTF8", "--no-locale", "-A", "trust", folder=new):
        with suppress(OSError):  # another process was faster
            new.rename(DATA)
    for unfinished in HERE.glob(".postgres-*"):
        shutil.rmtree(unfinished, ignore_errors=True)
    if not DATA.exists():
        raise StartupError("The embedded database cannot be made")  # initdb has said why


def start_or_join(sockets: Path, parameters: dict[str, Any]) -> psycopg.Connection[Any]:
    """A connection that holds the shared lock. Raises StartupError, and OSError."""
    if ROOT:
        owner = ""
        with suppress(KeyError):  # a volume's may have no name here
            owner = DATA.owner()
        if owner != SERVER_USER:
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), str(DATA))
    began = time.monotonic()
    while True:
        sockets.mkdir(mode=0o700, exist_ok=True)  # each time: a last process may just have removed it
        if os.name == "posix" and sockets.lstat().st_uid != os.geteuid():
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), str(sockets))
        if ROOT:
            shutil.chown(sockets, group=SERVER_USER)
            sockets.chmod(0o770)
        try:
            user = psycopg.connect(**parameters, autocommit=True)
            user.execute("SELECT pg_advisory_lock_shared(0)")
            return user
        except psycopg.OperationalError as error:
            why, waited = reason(error), time.monotonic() - began
        if waited > START_PATIENCE:
            raise StartupError(f"The embedded database does not start, see {DATA / 'log'}: {why}")
        if waited > 3 and "FATAL" not in why:
            # Nobody answers: these are left from a power loss, or came with a copy of the folder, and
            # PostgreSQL believes them if their process id is some other program's now.
            for stale in (DATA / "postmaster.pid", sockets / ".s.PGSQL.5432.lock"):
                stale.unlink(missing_ok=True)
        postgres("pg_ctl", "-l", "log", "-o", f"-k {sockets} -p 5432 -c listen_addresses=", "start", folder=DATA)
        time.sleep(0.1)  # it may be starting, or stopping, already


def postgres(program: str, *arguments: str, folder: Path) -> bool:
    """Whether one of PostgreSQL's programs, out of reach of a Ctrl-C, did its work on `folder`."""
    options: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "start_new_session": True}
    if program != "initdb":  # a start may fail because another process is faster
        options["stderr"] = subprocess.DEVNULL
    options["creationflags"] = getattr(subprocess, "CREATE_NO_WINDOW", 0)  # which only Windows has
    programs = Path(str(distribution("embedded-postgres").locate_file("embedded_postgres/pginstall/bin")))
    if ROOT:  # as whom PostgreSQL refuses to run: another user gets a way to its files, not to read others
        options |= {"user": SERVER_USER, "group": SERVER_USER, "extra_groups": []}
        for parent in (*DATA.parents, *programs.resolve().parents):
            parent.chmod(parent.stat().st_mode | 0o001)
    # The folder is named . because pg_ctl hands its name to a shell.
    command = [str(programs / program), "-D", ".", *arguments]
    return subprocess.run(command, check=False, cwd=folder, **options).returncode == 0


@event.listens_for(engine, "handle_error")
def renew_read_only_connections(context: ExceptionContext) -> None:
    """Has the pool replace its connections after an error that only new ones may not have."""
    if isinstance(context.original_exception, psycopg.errors.ReadOnlySqlTransaction):
        context.is_disconnect = True


@event.listens_for(engine, "checkout")
def refuse_dead_connection(connection: psycopg.Connection, *_: object) -> None:
    """Has the pool replace a connection that the server has closed: a microsecond, no round trip."""
    try:
        connection.pgconn.consume_input()  # reads the server's farewell, if there is one
        connection.pgconn.consume_input()  # and then finds the connection closed
    except psycopg.OperationalError as error:
        raise exc.DisconnectionError from error


def create_tables() -> None:
    """Creates the table unless it is there, and waits for a database that is not. Raises StartupError."""
    give_up, pause = time.monotonic() + START_PATIENCE, 0.5
    while True:
        try:
            with engine.execution_options(isolation_level="READ COMMITTED").begin() as connection:
                # One process at a time: its number is any that all have. The lock ends with the transaction,
                # which a transaction pooler keeps on one server; a session's lock would be lost there.
                connection.execute(select(func.pg_advisory_xact_lock(0x7461736B)))
                Task.metadata.create_all(connection)
                connection.execute(select(Task).limit(0))
            return
        except exc.DBAPIError as error:
            why = reason(error)
            transient = isinstance(error, exc.OperationalError) and not FINAL.search(why)
            if not transient or time.monotonic() + pause > give_up:
                raise StartupError(f"The database of DATABASE_URL cannot be used: {why}") from None
            logger.warning("No database yet, next try in %g s: %s", pause, why)
            time.sleep(pause)
            pause = min(2 * pause, 10)
