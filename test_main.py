"""The contract, executable: real HTTP to real uvicorn processes on a real PostgreSQL.

    BASE_URL=https://host:port pytest

asks that server instead, ours or another, and skips what needs a server of our own. It must take the user
from the header that USER_ID_HEADER names here, X-User-Id by default. A failure there breaks what the API
promises to everybody: status codes, {"error": text}, isolation, limits, idempotence, nothing lost. What is
our own choice (wording, order, Location, /docs, paging, 404 and not 403 ...) is only tested where OURS.
"""

import asyncio
import json
import multiprocessing.forkserver
import os
import re
import resource
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from datetime import UTC, date, datetime
from functools import cached_property, partial
from pathlib import Path
from urllib.parse import quote, urlencode

import httpx
import psycopg
import pytest
import uvicorn

BASE_URL = os.environ.get("BASE_URL")
HEADER = os.environ.get("USER_ID_HEADER") or "X-User-Id"
OURS = not BASE_URL
ours = pytest.mark.skipif(not OURS, reason="is our own choice, or about the app in this folder")

HERE = Path(__file__).parent
PROCFILE = (HERE / "Procfile").read_text().removeprefix("web: ").strip()
FIELDS = ["id", "user_id", "title", "description", "status", "created_at", "updated_at"]
TASKS = "/api/{user_id}/tasks"
OF_A_TASK = [("GET", "/{task_id}"), ("PUT", "/{task_id}"), ("DELETE", "/{task_id}"), ("PATCH", "/{task_id}/complete")]
ROUTES = [("GET", ""), ("POST", ""), *OF_A_TASK]  # after TASKS

UNAUTHENTICATED = (401, "Authentication required")
NOT_FOUND = (404, "Not found")  # by others, a foreign path may also be forbidden
TASK_NOT_FOUND = (404, "Task not found")
UNAVAILABLE = (500, "Database unavailable")
WRONG_ID = "Task id must be a positive integer"
WRONG_STATUS = "Status must be 'incomplete' or 'complete'"
NO_TITLE, NO_CHANGE = "Title is required", "Send at least one of title, description, status"


def expect(response, status, *errors):
    """The answer's JSON: whole tasks, or an error, which of ours is one of `errors`."""
    asked = f"{response.request.method} {response.url} answered {response.status_code} {response.text[:500]}"
    forbidden = response.status_code == 403 and (status, *errors) == NOT_FOUND and not OURS
    assert response.status_code == status or forbidden, asked
    assert re.fullmatch("application/json" if OURS else "application/json *(;.*)?", response.headers["content-type"])
    body = response.json()
    if status < 400:
        for task in body if isinstance(body, list) else [body]:
            fields = [field for field in task if field in FIELDS]
            assert fields == FIELDS if OURS else set(fields) == set(FIELDS), asked
    else:
        assert list(body) == ["error"] if OURS else "error" in body, asked
        assert isinstance(body["error"], str), asked
        assert not errors or body["error"] in errors or not OURS, asked
    return body


class User:
    """One of the users of a server, whose name nobody had before, and the path of that name."""

    lists = True  # whether the server has that route

    def __init__(self, http, name=None, headers=None):
        self.http = http
        self.name = name if name is not None else f"user-{uuid.uuid4()}"
        self.headers = headers if headers is not None else {HEADER: self.name.encode()}
        self.url = f"/api/{quote(self.name, safe='')}/tasks"

    def send(self, method, path="", body=None, headers=None, **options):
        if body is not None:  # escaped by json.dumps: a lone surrogate has no UTF-8
            content = body if isinstance(body, bytes) else json.dumps(body)
            options, headers = options | {"content": content}, {"Content-Type": "application/json"} | (headers or {})
        return self.http.request(method, self.url + path, headers=self.headers | (headers or {}), **options)

    def tasks(self, **query):
        return expect(self.send("GET", params=query), 200)

    def read(self, task):
        return expect(self.send("GET", f"/{task['id']}"), 200)

    def owns(self, *tasks):
        """Asserts it; where the server lists nothing, which fails tests enough, by reading them."""
        assert (self.tasks() if self.lists else [self.read(each) for each in tasks]) == [*tasks]

    def create(self, **fields):
        return expect(self.send("POST", body={"title": "Buy groceries"} | fields), 201)

    def update(self, task, **changes):
        return expect(self.send("PUT", f"/{task['id']}", changes), 200)

    def ask_everywhere(self, task_id, where="{user_id}"):
        """The answers of all routes that have `where` in their path, those added later too, as in the document."""
        paths = self.http.get("/openapi.json").json()["paths"] if OURS else {}
        routes = [(method.upper(), path) for path in paths for method in paths[path]]
        for method, path in routes or [(method, TASKS + path) for method, path in ROUTES]:
            if where in path:
                body = {"title": "Taken over"} if method in ("POST", "PUT") else None
                yield self.send(method, path.replace("{task_id}", str(task_id)).removeprefix(TASKS), body)


def together(call, times, threads=16):
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(call, range(times)))


def wait_until(happens):
    """Whether it did within 30 s."""
    deadline = time.monotonic() + 30
    while not (happened := happens()) and time.monotonic() < deadline:
        time.sleep(0.01)
    return happened


def seconds_ago(text):
    assert text.endswith("Z") or not OURS
    return (datetime.now(UTC) - datetime.fromisoformat(text)).total_seconds()


def cases(table):
    """Parameters out of a table of messages and what they are the answer to."""
    pairs = [(message, each) for message, several in table.items() for each in several]
    return [pytest.param(*pair, id=f"{pair[0]}: {ascii(pair[1])[:30]}") for pair in pairs]


# Servers and their database

fork = multiprocessing.get_context("forkserver")
# What is slow to import; not main, which reads its settings then.
PRELOADED = "test_main fastapi.openapi.utils starlette.middleware.cors sqlmodel sqlalchemy.dialects.postgresql.psycopg"
PRELOADED += " pydantic.v1 dotenv uvloop uvicorn.lifespan.on uvicorn.protocols.http.h11_impl"
fork.set_forkserver_preload([*PRELOADED.split(), "uvicorn.middleware.proxy_headers"])


def in_child(log, folder, settings, target):
    """Calls `target` as a shell starts a program: in `folder`, with these settings and no others."""
    os.setsid()
    for number in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_APPEND), number)
    if folder == HERE:  # set but empty, they keep out the .env of whoever runs the tests
        settings = dict.fromkeys(("DATABASE_URL", "USER_ID_HEADER", "ALLOWED_ORIGINS"), "") | settings
    os.environ.update(settings)
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    target()


def run_uvicorn(arguments):
    uvicorn.main(arguments)


class Program:
    """A process of its own, a server as a rule, which ends with the `with` block."""

    def __init__(self, target, folder=HERE, **settings):
        self.output, self.folder = tempfile.NamedTemporaryFile("r"), folder  # noqa: SIM115
        self.process = fork.Process(target=in_child, args=(self.output.name, folder, settings, target), daemon=True)
        self.process.start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.process.exitcode is None:
            # Killed, it would leave its embedded database running, which only a copy of the app has.
            self.end(signal.SIGKILL if self.folder == HERE else signal.SIGTERM)

    @property
    def log(self):
        self.output.seek(0)
        return self.output.read()

    def wait_for(self, text, times=1):
        """Waits until the log says `text`."""
        wait_until(lambda: len(re.findall(text, self.log)) >= times or self.process.exitcode is not None)
        found = re.findall(text, self.log)
        assert len(found) >= times, self.log
        return found[-1]

    def end(self, number, timeout=20):
        """Sends the signal, if any, and returns the exit code, None while it runs."""
        if number:
            os.kill(self.process.pid, number)
        self.process.join(timeout)
        return self.process.exitcode

    @cached_property
    def http(self):
        """Once the server answers."""
        self.wait_for("Application startup complete")
        return connect(self.wait_for(r"Uvicorn running on (http://\S+)"))

    def user(self, name=None):
        return User(self.http, name)


def connect(url):
    hooks = {"request": [lambda request: print(request.method, request.url)]}  # which pytest shows of failures
    transport = httpx.HTTPTransport(limits=httpx.Limits(max_connections=None, keepalive_expiry=2), retries=3)
    return httpx.Client(base_url=url, timeout=30, transport=transport, event_hooks=hooks)


def serve(app, *options, by_command=False, folder=HERE, **settings):
    """The app as the Procfile runs it, with `options` added; a name that is not main:app is a factory's."""
    factory = [] if app == "main:app" else ["--factory"]
    arguments = [app, *factory, *shlex.split(PROCFILE.replace("$PORT", "0"))[2:], "--host=127.0.0.1", *options]
    command = partial(os.execv, Path(sys.executable).with_name("uvicorn"), ["uvicorn", *arguments])
    return Program(command if by_command else partial(run_uvicorn, arguments), folder, **settings)


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as unused:
        return unused.getsockname()[1]


class Database:
    """A PostgreSQL of its own in a temporary folder, reached over TCP, which logs every statement."""

    guarded, password = "o'hara@home", "p@ss/w%rd:?#"  # the user who needs one

    def __init__(self):
        import db

        self.folder = db.HERE = Path(tempfile.mkdtemp(prefix="tasks-"))
        self.data = db.DATA = self.folder / "data"
        db.make_data()  # as the app makes its embedded database
        self.pg_ctl, self.port = partial(db.postgres, "pg_ctl", folder=self.data), free_port()
        access = self.data / "pg_hba.conf"
        access.write_text(f'host all "{self.guarded}" 127.0.0.1/32 scram-sha-256\n{access.read_text()}')
        self.start()
        self.execute(f"CREATE ROLE \"{self.guarded}\" LOGIN PASSWORD '{self.password}'")

    def start(self):
        settings = f"-p {self.port} -k '' -c fsync=off -c log_min_duration_statement=0 -c log_line_prefix=%a:"
        assert self.pg_ctl("-o", settings, "-l", "log", "start")

    @contextmanager
    def stopped(self):
        self.pg_ctl("stop")
        try:
            yield
        finally:
            self.start()

    def restart(self):
        with self.stopped():
            pass

    def url(self, user="postgres", name="postgres", **query):
        return f"postgresql://{user}@127.0.0.1:{self.port}/{quote(name)}?{urlencode(query, quote_via=quote)}"

    def execute(self, sql, *values, name="postgres"):
        with psycopg.connect(self.url(name=name), autocommit=True) as connection:
            cursor = connection.execute(sql, values or None)
            return cursor.fetchall() if cursor.description else []

    @property
    def log(self):
        return (self.data / "log").read_text()

    def statements(self, application):
        """How many an application has had this server do, which logs them before it answers."""
        return len(re.findall(rf"(?m)^{application}:.*ms  (?:statement|execute .*): ", self.log))

    def sessions(self, application, state="%"):
        query = "SELECT pid FROM pg_stat_activity WHERE application_name = %s AND state LIKE %s"
        return [pid for (pid,) in self.execute(query, application, state)]

    def end_sessions(self):
        others = "pid <> pg_backend_pid() AND backend_type = 'client backend'"
        self.execute(f"SELECT pg_terminate_backend(pid, 1000) FROM pg_stat_activity WHERE {others}")

    @contextmanager
    def locked(self, task):
        """Holds a task's row, as another client of the database may."""
        with psycopg.connect(self.url()) as connection:
            connection.execute("UPDATE task SET title = title WHERE id = %s", [task["id"]])
            yield

    def insert(self, user, number, description=None):
        """Many tasks, quickly, every other complete; returns their ids as a list has them."""
        sql = "INSERT INTO task (user_id, title, description, status) SELECT %s, n, %s, (ARRAY['incomplete', 'complete'"
        sql += "])[1 + n %% 2] FROM generate_series(1, %s) n RETURNING id"
        return [task_id for (task_id,) in self.execute(sql, user.name, description, number)][::-1]


@pytest.fixture(scope="session")
def database():
    if not OURS:
        pytest.skip("needs servers and a database of our own")
    multiprocessing.forkserver.ensure_running()  # imports while PostgreSQL starts
    database = Database()
    yield database
    database.pg_ctl("-m", "immediate", "stop")
    shutil.rmtree(database.folder)


def shared(application, app="main:app", scheme="postgresql", **settings):
    """A fixture: a server that several tests use, known to the database as `application`."""

    @pytest.fixture(scope="session")
    def started(database):
        url = database.url(application_name=application).replace("postgresql", scheme)
        with serve(app, DATABASE_URL=url, **settings) as server:
            yield server

    return started


@pytest.fixture(scope="session")
def server(request, database):
    """The server of most tests, in all of which it logs nothing alarming."""
    for slow in ("clones", "restarts"):  # they begin now, and are used last
        if any(slow in item.fixturenames for item in request.session.items):
            request.getfixturevalue(slow)
    with serve("main:app", DATABASE_URL=database.url(application_name="server"), USER_ID_HEADER=HEADER) as server:
        yield server
        assert server.end(signal.SIGTERM) == -signal.SIGTERM
        assert not re.findall(".*Traceback.*|ERROR.*|WARNING.*", server.log)


@pytest.fixture(scope="session")
def http(request):
    """The server that is tested. Without a sensible first answer the run ends."""
    if OURS:
        return request.getfixturevalue("server").http
    user = User(connect(BASE_URL))
    try:
        answer = user.send("GET")
        got = f"{answer.status_code} {answer.headers.get('content-type')} {answer.text[:200]}"
        if answer.status_code != 401 and "json" in answer.headers.get("content-type", ""):
            User.lists = answer.status_code == 200
            return user.http
    except httpx.HTTPError as error:
        got = f"{error!r} (within 30 s)"
    asked = f"GET {BASE_URL}{user.url} with {HEADER}: {user.name}"
    return pytest.exit(f"\nasked: {asked}\nexpected: 200 application/json []\ngot: {got}", 2)


@pytest.fixture
def alice(http):
    return User(http)


@pytest.fixture
def bob(http):
    return User(http)


@pytest.fixture
def task(alice):
    return alice.create(description="Milk, eggs, bread")


# Who is asking


@pytest.mark.parametrize("values", [[], [""], ["\u00a0".encode()], ["alice", "alice"], ["n" * 256]], ids=str)
def test_without_one_user_header_nobody_asks(http, values):
    expect(http.get("/api/alice/tasks", headers=[(HEADER, value) for value in values]), *UNAUTHENTICATED)


STRANGERS = {"nobody": UNAUTHENTICATED, "Bob on her path": NOT_FOUND, "Bob on his own path": TASK_NOT_FOUND}


@pytest.mark.parametrize(("stranger", "answer"), STRANGERS.items())
def test_every_route_keeps_strangers_from_alices_tasks(alice, bob, task, stranger, answer):
    hers = User(alice.http, alice.name, {} if stranger == "nobody" else bob.headers)
    asking, where = (bob, "{task_id}") if answer == TASK_NOT_FOUND else (hers, "{user_id}")
    for response in asking.ask_everywhere(task["id"], where):
        expect(response, *answer)
    alice.owns(task)
    bob.owns()


def test_the_path_names_the_user_exactly(alice):
    for change in (str.upper, str.title, "{} ".format, " {}".format, "{}/".format):
        expect(User(alice.http, change(alice.name), alice.headers).send("GET"), *NOT_FOUND)
    expect(alice.http.get("/api/%FF/tasks", headers={HEADER.encode(): b"\xff"}), *NOT_FOUND)  # is not UTF-8


IDS = ["auth0|65f2c", "user_2NNEqL2nrI", "zoë@example.com", "💚", "a/b", "/", "a b", "x/tasks/1", "%41", "a?b#c", "o'h"]


@pytest.mark.parametrize("name", [*IDS, "n" * 219], ids=ascii)
def test_any_string_is_a_user_id(http, name):
    user = User(http, f"{name}{uuid.uuid4()}")
    created = user.send("POST", body={"title": "x"})
    assert expect(created, 201)["user_id"] == user.name
    user.owns(created.json())
    assert created.headers.get("location") == f"{user.url}/{created.json()['id']}" or not OURS


def test_401_comes_before_404_and_404_before_400(alice, bob):
    for method, path in (("GET", "?status=wrong"), ("POST", ""), ("PUT", "/wrong")):
        expect(User(alice.http, alice.name, {}).send(method, path, {"title": 1}), *UNAUTHENTICATED)
        expect(User(alice.http, alice.name, bob.headers).send(method, path, {"title": 1}), *NOT_FOUND)
        expect(alice.send(method, path, {"title": 1}), 400)


def token_layer(app):
    """An authentication layer: it says who the user is, or that it is nobody."""

    async def layer(scope, receive, send):
        if scope["type"] == "http":
            token = dict(scope["headers"]).get(b"authorization", b"Bearer null").removeprefix(b"Bearer ")
            scope.setdefault("state", {})["user_id"] = json.loads(token)
        await app(scope, receive, send)

    return layer


def bearer(user):
    return {"Authorization": f"Bearer {json.dumps(user)}"}


def wrapped():
    from main import app

    return token_layer(app)


def extended():
    """The app with an authentication layer, and with routes such as somebody may add."""
    from fastapi import Depends
    from fastapi.security import HTTPBasic
    from pydantic import BaseModel, model_validator
    from sqlalchemy import Column, Integer

    from models import Task

    Task.metadata.tables["task"].append_column(Column("not_public", Integer))  # so no statement may return it
    from main import app

    class Event(BaseModel):
        due: date = date(2030, 1, 1)
        hours: int = 1

        @model_validator(mode="after")
        def is_short(self):
            if self.hours > 8:
                raise ValueError("Hours must be 8 or less")
            return self

    @app.post("/events", dependencies=[Depends(HTTPBasic(auto_error=False))])
    def create_event(event: Event) -> Event:
        return event

    @app.get("/broken")
    def broken() -> None:
        raise RuntimeError("the cause")

    @app.get("/memory")
    def peak_memory_in_mib() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024

    app.add_middleware(token_layer)
    return app


ORIGINS, STRANGE_ORIGIN = ["https://app.example.com", "http://localhost:3000"], "https://app.example.com.evil.com"
CORS = {"ALLOWED_ORIGINS": " {}/ ,,{}".format(*ORIGINS)}
extended_server = shared("extended", "test_main:extended", "postgres", USER_ID_HEADER=HEADER, **CORS)
wrapped_server = shared("wrapped", "test_main:wrapped", "postgresql+psycopg", USER_ID_HEADER=HEADER)
closed = shared("closed")  # as it is first deployed, with nothing but a database


@pytest.fixture(params=["extended_server", "wrapped_server"])
def layered(request):
    return request.getfixturevalue(request.param).http


def test_the_layer_says_who_asks_and_what_is_no_user_id_is_nobody(layered):
    name = f"a\n{uuid.uuid4()}"  # which a header cannot say
    user, lying = User(layered, name, bearer(name)), {HEADER: "bob"}
    tasks = [user.create(), expect(user.send("POST", body={"title": "x"}, headers=lying), 201)]
    assert {task["user_id"] for task in tasks} == {name}
    user.owns(*tasks[::-1])
    assert [user.read(task) for task in tasks] == tasks
    for name in ("", " \t", 42, True, ["a"], "n" * 256, "a\0b", "\0"):
        user = User(layered, str(name), bearer(name) | lying)
        expect(user.send("POST", body={"title": "x"}), *UNAUTHENTICATED)


UNBELIEVED = [(each, "a header", UNAUTHENTICATED) for each in ("extended_server", "wrapped_server", "closed")]
UNBELIEVED += [("closed", "nothing", UNAUTHENTICATED), ("extended_server", "Bob's token, a lying header", NOT_FOUND)]


@pytest.mark.parametrize(("server_name", "says", "answer"), UNBELIEVED)
def test_the_path_is_never_believed(request, alice, task, server_name, says, answer):
    headers = {"nothing": {}, "a header": alice.headers}.get(says, alice.headers | bearer("bob"))
    for response in User(request.getfixturevalue(server_name).http, alice.name, headers).ask_everywhere(task["id"]):
        expect(response, *answer)
    alice.owns(task)


# The task


def test_a_new_task_has_all_its_fields_and_the_highest_id(alice, bob):
    older = [alice.create(), bob.create()]
    task = alice.create(title="Buy groceries", description="Milk, eggs, bread")
    born = task["created_at"]
    fields = [task["id"], alice.name, "Buy groceries", "Milk, eggs, bread", "incomplete", born, born]
    assert [task[field] for field in FIELDS] == fields
    assert abs(seconds_ago(born)) < 60
    assert type(task["id"]) is int
    assert older[0]["id"] < older[1]["id"] < task["id"]


TITLES = ["x" * 255, "💚" * 255, "\u200b", "'); DROP TABLE task; --", "%s %(title)s :title {0} \\", "\x01\x7f\n\u2028b"]
TRIMMED = {" \t\n a b \u00a0\u3000": "a b", f"  {'x' * 255}  ": "x" * 255} | ({"\x85 a \x85": "a"} if OURS else {})
KEPT = [("title", each, each) for each in TITLES] + [("title", *each) for each in TRIMMED.items()]
KEPT += [("description", each, each) for each in ("", " kept \n", "y" * 5000, "💚" * 5000, None)]


@pytest.mark.parametrize(("field", "sent", "kept"), KEPT, ids=lambda each: ascii(each)[:20])
def test_titles_are_trimmed_and_descriptions_kept(alice, field, sent, kept):
    tasks = [alice.create(**{field: sent}), alice.update(alice.create(description="x"), **{field: sent})]
    assert [task[field] for task in tasks] == [kept, kept]
    alice.owns(*tasks[::-1])


LONG_TITLE, LONG_TEXT = "Title must be 255 characters or less", "Description must be 5000 characters or less"
WRONG_BODIES = {
    LONG_TITLE: [{"title": "x" * 256}, {"title": "💚" * 256}],
    LONG_TEXT: [{"title": "x", "description": "y" * 5001}],
    f"{LONG_TITLE}; {LONG_TEXT}": [{"title": "x" * 256, "description": "y" * 5001}],
    "Title must be a string": [{"title": each} for each in (1, True, float("nan"), ["x"], {})],
    "Title must not contain NUL characters": [{"title": "a\0"}],
    "Title must not contain lone surrogates": [{"title": "\ud800"}],
    "Description must be a string": [{"title": "x", "description": each} for each in (1.5, float("inf"), {})],
    "Description must not contain NUL characters": [{"title": "x", "description": "\0"}],
    "Description must not contain lone surrogates": [{"title": "x", "description": "a\udfff"}],
    "Body must be a JSON object": [b"", b'["title"]', b'"title"', b"1", b"null"],
    "Body must be valid JSON": [b"title", b'{"title": "x"', b'{"title": "x"} {}', b"{'title': 'x'}"],
    "There was an error parsing the body": [
        b'{"title": "\xff"}',
        b'{"title": ' + 30_000 * b"[" + 30_000 * b"]" + b"}",
        b'{"title": "x", "other": ' + 5_000 * b"9" + b"}",
    ],
}
BLANKS = [{"title": each} for each in (None, "", " \t\u3000")]
STATUSES = ["done", "Complete", "complete ", "", "\ud800", None, True, 1, float("nan"), ["complete"]]
WRONG_TASKS = {NO_TITLE: [{"description": "x"}, *BLANKS]}
WRONG_UPDATES = {"Title cannot be empty": BLANKS, WRONG_STATUS: [{"status": each} for each in STATUSES]}
WRONG_UPDATES[NO_CHANGE] = [{}, {"id": 1, "user_id": "bob", "colour": "red"}]


@pytest.mark.parametrize(("message", "body"), cases(WRONG_BODIES | WRONG_TASKS | WRONG_UPDATES))
def test_wrong_bodies_are_refused(alice, task, message, body):
    if message not in WRONG_UPDATES:
        expect(alice.send("POST", body=body), 400, message)
    if message not in WRONG_TASKS:
        expect(alice.send("PUT", f"/{task['id']}", body), 400, message)
    alice.owns(task)


def test_create_ignores_other_fields(alice):
    for other in ({"id": 1, "status": "complete"}, {"id": "x", "status": 7, "colour": "\ud800"}):
        task = alice.create(user_id="bob", created_at=[], **other)
        assert (task["user_id"], task["status"]) == (alice.name, "incomplete")
        assert task["id"] != other["id"]


READ_ONLY = {"id": 0, "user_id": "bob", "created_at": "2000-01-01T00:00:00Z", "updated_at": None}
CHANGES = [{"title": "new"}, {"description": "new"}, {"description": None}, {"status": "complete"}]


@pytest.mark.parametrize("sent_back", [{}, READ_ONLY], ids=["alone", "in a whole task"])
@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_an_update_changes_what_is_sent_and_can_be(alice, task, change, sent_back):
    updated = alice.update(task, **(task | sent_back if sent_back else {}) | change)
    assert updated == task | change | {"updated_at": updated["updated_at"]}
    assert updated["updated_at"] > task["updated_at"] or not OURS  # others may count in seconds
    alice.owns(updated)


@pytest.mark.parametrize("body", [b"", b'{"title": "new"}', b"{", b"\xff"])
def test_complete_completes_once_and_ignores_a_body(alice, task, body):
    completed, again = (expect(alice.send("PATCH", f"/{task['id']}/complete", body), 200) for _ in range(2))
    assert completed == again == task | {"status": "complete", "updated_at": completed["updated_at"]}
    assert completed["updated_at"] > task["updated_at"] or not OURS
    assert alice.update(task, status="incomplete")["status"] == "incomplete"


def test_a_deleted_task_is_gone_and_others_never_were(alice, task):
    deleted = alice.send("DELETE", f"/{task['id']}")
    assert (deleted.status_code, deleted.content) == (204, b"")
    assert "content-type" not in deleted.headers or not OURS
    for task_id in (task["id"], 2**63 - 1):
        for response in alice.ask_everywhere(task_id, "{task_id}"):
            expect(response, *TASK_NOT_FOUND)


NO_IDS = ["abc", "0", "-1", "+1", "01", "1_0", "1.0", "1e3", "0x1", "%201", "1%20", "1%0A", "1%00", "%D9%A1", "²"]
NO_IDS += ["9" * 20, str(2**63), "9" * 5000]


@pytest.mark.parametrize(("method", "path"), OF_A_TASK)
def test_ids_are_plain_positive_integers(alice, method, path):
    for task_id in NO_IDS:
        body = {"title": "x"} if method == "PUT" else None
        expect(alice.send(method, path.replace("{task_id}", task_id), body), 400, WRONG_ID)


# Lists


def test_lists_are_newest_first_and_can_be_of_one_status(alice):
    assert alice.tasks() == []
    first, second, third = (alice.create() for _ in range(3))
    second = alice.update(second, status="complete")
    assert alice.tasks(colour="red") == [third, second, first]
    assert alice.tasks(status="complete") == [second]
    assert alice.tasks(status="incomplete") == [third, first]


@ours
def test_a_list_can_be_read_page_by_page(alice):
    tasks = [alice.create() for _ in range(5)]
    tasks = [alice.update(each, status="complete") if number % 2 else each for number, each in enumerate(tasks)][::-1]
    assert alice.tasks(limit=2) == tasks[:2]
    assert alice.tasks(limit=2, before=tasks[1]["id"]) == tasks[2:4]
    assert alice.tasks(limit=100, before=tasks[3]["id"]) == tasks[4:]
    assert alice.tasks(before=tasks[0]["id"]) == tasks[1:]
    assert alice.tasks(before=1) == []
    assert alice.tasks(limit=1, before=2**63 - 1, status="complete") == tasks[1:2]
    assert alice.tasks(limit=1, before=tasks[1]["id"], status="complete") == tasks[3:4]


def test_wrong_queries_are_refused(alice):
    statuses = ["done", "COMPLETE", "", "%20complete", "null"]
    limits = ["0", "101", "-1", "01", "%2B1", "1.0", "x", "", "1%20", "9" * 5000]
    wrong = [(WRONG_STATUS, "status", statuses), ("Limit must be an integer from 1 to 100", "limit", limits)]
    wrong.append(("Before must be a positive integer", "before", [*NO_IDS, ""]))
    for message, name, values in wrong if OURS else wrong[:1]:
        for value in values:
            expect(alice.send("GET", f"?{name}={value}"), 400, message)


# Asked by one test at a time, one thing after the other, so that it has one connection, and that open.
counted = shared("counted", USER_ID_HEADER=HEADER)
LISTS = [(0, "", 1), (100, "", 1), (101, "", 2), (250, "", 3)]
LISTS += [(251, "?status=complete", 2), (250, "?status=incomplete", 2)]


@pytest.mark.parametrize(("number", "query", "statements"), LISTS)
def test_lists_are_whole_and_read_in_pages_of_100(database, counted, number, query, statements):
    user = counted.user()
    ids = database.insert(user, number)
    user.tasks(limit=1)
    before = database.statements("counted")
    response = user.send("GET", query)
    assert [each["id"] for each in expect(response, 200)] == (ids[::2] if query else ids)
    assert database.statements("counted") - before == statements
    assert ("content-length" in response.headers) == (statements == 1)


@pytest.fixture(scope="session")
def hoarder(database, extended_server):
    """Whose list, of 16 MB, does not fit into the buffers of a connection."""
    name = f"hoarder-{uuid.uuid4()}"
    user = User(extended_server.http, name, bearer(name))
    database.insert(user, 800, "💚" * 5000)
    return user


def test_memory_does_not_grow_with_bodies_or_lists(hoarder):
    def upload(number):
        content = (100_000 * b"x" for _ in range(100)) if number % 2 else 10_000_000 * b"x"
        try:
            return hoarder.send("POST", content=content).status_code
        except httpx.TransportError:  # it hung up while we were still sending
            return 413

    before = hoarder.http.get("/memory").json()
    assert set(together(upload, 12)) == {413}
    assert hoarder.http.get("/memory").json() - before < 15
    assert {len(response.content) > 15_000_000 for response in together(lambda _: hoarder.send("GET"), 4)} == {True}
    assert hoarder.http.get("/memory").json() - before < 45


def test_a_list_that_nobody_reads_holds_up_nobody_and_one_that_fails_is_cut(database, hoarder):
    user = User(hoarder.http, "alice", bearer("alice"))
    before = hoarder.http.get("/memory").json()
    small = httpx.HTTPTransport(socket_options=[(socket.SOL_SOCKET, socket.SO_RCVBUF, 200_000)])
    with httpx.Client(base_url=user.http.base_url, transport=small) as http, ExitStack() as stack:
        unread = [http.stream("GET", hoarder.url, headers=hoarder.headers) for _ in range(30)]
        responses = [stack.enter_context(each) for each in unread]
        start = time.monotonic()
        together(lambda _: user.tasks(limit=1), 30)
        assert time.monotonic() - start < 3
        assert wait_until(lambda: not database.sessions("extended", "active"))
        assert hoarder.http.get("/memory").json() - before < 90  # 30 pages of 2 MB, and what is on its way
        with database.stopped(), pytest.raises(httpx.RemoteProtocolError):
            responses[0].read()
    assert len(hoarder.tasks()) == 800


# Bodies, paths and methods


def test_bodies_are_declared_as_json(alice):
    for declared in ("", "text/plain", "application/x-www-form-urlencoded", "application/jsonp", None):
        headers = {} if declared is None else {"Content-Type": declared}
        response = alice.send("POST", content=b'{"title": "x"}', headers=headers)
        expect(response, 400, "Content-Type must be application/json")
    alice.owns()
    for declared in ("application/json; charset=utf-8", "Application/JSON"):
        expect(alice.send("POST", content=b'{"title": "x"}', headers={"Content-Type": declared}), 201)


@pytest.mark.parametrize("stream", [bytes, lambda body: iter([body[:-1], body[-1:]])], ids=["declared", "streamed"])
def test_bodies_have_at_most_128_kib_on_every_route(alice, task, stream):
    body, declared = b'{"title": "x"}'.ljust(128 * 1024), {"Content-Type": "application/json"}
    for method, path in ROUTES if OURS else [("POST", "")]:
        path = path.replace("{task_id}", str(task["id"]))
        response = alice.send(method, path, content=stream(body + b" "), headers=declared)
        expect(response, 413, "Body must be 128 KiB or less")
    alice.owns(task)
    expect(alice.send("POST", content=stream(body), headers=declared), 201)


@ours
def test_other_paths_are_not_found(alice):
    others = ["/nowhere", "/api", f"/api/{alice.name}", f"/api/{alice.name}/Tasks", "/health/", "/docs/", "/redoc"]
    others += [alice.url + each for each in ("/", "/1/", "/1/other", "/1/complete/")]
    for path in others:
        expect(alice.http.get(path, headers=alice.headers), *NOT_FOUND)


def test_other_methods_are_not_allowed(alice):
    others = {("DELETE", ""): "GET, POST", ("OPTIONS", ""): "GET, POST"}
    others |= {("POST", "/1"): "DELETE, GET, PUT", ("PATCH", "/1"): "DELETE, GET, PUT"}
    for (method, path), allowed in (
        others | {("GET", "/1/complete"): "PATCH", ("POST", "/1/complete"): "PATCH"}
    ).items():
        response = alice.send(method, path)
        expect(response, 405, "Method Not Allowed")
        assert response.headers.get("allow") == allowed or not OURS


# Around the six


@ours
def test_health_and_documentation_need_no_user(http):
    for method, body in {"GET": '{"status":"ok"}', "HEAD": ""}.items():
        health = http.request(method, "/health")
        assert (health.status_code, health.headers["content-type"], health.text) == (200, "application/json", body)
    root = http.get("/")
    assert (root.is_redirect, root.headers["location"]) == (True, "/docs")
    assert http.get("/docs").headers["content-type"] == "text/html; charset=utf-8"


@pytest.fixture(scope="session")
def document(server):
    return server.http.get("/openapi.json").json()


STATUS, AN_ID = {"$ref": "#/components/schemas/Status"}, {"type": "integer", "format": "int64", "minimum": 1}
PARAMETERS = {
    "user_id": {"type": "string", "minLength": 1, "maxLength": 255},
    "task_id": AN_ID | {"maximum": 2**63 - 1},
    "status": STATUS,
    "limit": {"type": "integer", "minimum": 1, "maximum": 100},
    "before": AN_ID | {"maximum": 2**63 - 1},
}
EXAMPLES = {"GET ": (WRONG_STATUS, "Not found"), "POST ": (NO_TITLE, "Not found"), "PUT /{task_id}": (NO_CHANGE,)}


def test_the_document_describes_the_six_routes_with_their_parameters_and_errors(document):
    paths = document["paths"]
    assert [(method.upper(), path) for path in paths for method in paths[path]] == [(m, TASKS + p) for m, p in ROUTES]
    for method, path in ROUTES:
        operation = paths[TASKS + path][method.lower()]
        assert operation["summary"]
        assert operation["description"]
        parameters = {each["name"]: each["schema"] for each in operation["parameters"]}
        expected = ["user_id", *re.findall(r"{(\w+)}", path), *["status", "limit", "before"] * (method + path == "GET")]
        assert list(parameters) == expected
        assert parameters == {name: parameters[name] | PARAMETERS[name] for name in expected}
        wrong, absent, *_ = *EXAMPLES.get(f"{method} {path}", (WRONG_ID,)), "Task not found"
        errors = {"400": wrong, "401": UNAUTHENTICATED[1], "404": absent, "default": UNAVAILABLE[1]}
        answers = {code: answer["content"] for code, answer in operation["responses"].items() if code >= "3"}
        schema = {"$ref": "#/components/schemas/Error"}
        documented = {code: {"schema": schema, "example": {"error": text}} for code, text in errors.items()}
        assert answers == {code: {"application/json": each} for code, each in documented.items()}
    assert paths[TASKS]["post"]["responses"]["201"]["headers"]["Location"]["schema"] == {"type": "string"}
    assert "content" not in paths[f"{TASKS}/{{task_id}}"]["delete"]["responses"]["204"]


def test_the_schemas_say_what_is_accepted_in_words_that_all_generators_understand(document):
    schemas = document["components"]["schemas"]
    assert sorted(schemas) == ["Error", "Status", "TaskCreate", "TaskPublic", "TaskUpdate"]
    create, public, update = (schemas[each] for each in ("TaskCreate", "TaskPublic", "TaskUpdate"))
    assert schemas["Status"]["enum"] == ["incomplete", "complete"]
    assert (create["required"], public["required"]) == (["title"], list(public["properties"]))
    assert (update["type"], update["minProperties"]) == ("object", 1)
    assert not {"anyOf", "required"} & update.keys()
    assert public["properties"]["id"]["format"] == "int64"
    assert public["properties"]["status"] == update["properties"]["status"] == STATUS
    for properties in (create["properties"], update["properties"]):
        title, (text, null) = properties["title"], properties["description"]["anyOf"]
        assert (title["minLength"], title["maxLength"]) == (1, 255)
        assert (text["maxLength"], null) == (5000, {"type": "null"})
        accepted = [each for each in ("x", " x ", "", " \t", "x\0") if re.search(title["pattern"], each)]
        assert accepted == ["x", " x "]
        assert not re.search(text["pattern"], "x\0")
    patterns = re.findall(r'"pattern": "(.*?)"', json.dumps(document))
    assert set(re.findall(r"\\\\(x..|.)", "".join(patterns))) == {"x00", "s"}


API_KEY, TOKEN = {"type": "apiKey", "in": "header", "name": HEADER}, {"type": "http", "scheme": "bearer"}


@pytest.mark.parametrize(("which", "expected", "asked"), [("server", API_KEY, "APIKey"), ("closed", TOKEN, "Bearer")])
def test_the_document_says_how_to_authenticate(request, which, expected, asked):
    http = request.getfixturevalue(which).http
    document = http.get("/openapi.json").json()
    ((name, scheme),) = document["components"]["securitySchemes"].items()
    assert scheme == expected
    assert http.get("/api/alice/tasks").headers["www-authenticate"] == asked
    operations = [operation for methods in document["paths"].values() for operation in methods.values()]
    assert all(operation["security"] == [{name: []}] for operation in operations)


def test_routes_added_later_keep_their_security_and_their_errors_are_like_ours(extended_server):
    http = extended_server.http
    added = http.get("/openapi.json").json()["paths"]
    assert added["/events"]["post"]["security"] == [{"HTTPBasic": []}]
    assert "security" not in added["/broken"]["get"]
    expect(http.get("/broken"), 500, "Internal server error")
    extended_server.wait_for("RuntimeError: the cause")
    for body in ({"due": "soon"}, {"due": []}, {"hours": 9}, {"hours": "x"}, {"due": "", "hours": ""}):
        message = expect(http.post("/events", json=body), 400)["error"]
        assert re.search(".*; ".join(body), message, re.IGNORECASE)


ASKS, METHOD, NAMES = "Origin", "Access-Control-Request-Method", "Access-Control-Request-Headers"
PREFLIGHTS = [(200, ASKS, each) for each in ORIGINS] + [(400, ASKS, each) for each in (STRANGE_ORIGIN, "null")]
PREFLIGHTS += [(200, METHOD, each) for each in ("GET", "POST", "PUT", "PATCH", "DELETE")] + [(400, METHOD, "TRACE")]
PREFLIGHTS += [(200, NAMES, f"authorization,content-type,{HEADER}".lower()), (400, NAMES, "x-other")]


@pytest.mark.parametrize(("status", "header", "value"), PREFLIGHTS)
def test_allowed_origins_may_use_all_routes_and_their_headers(extended_server, closed, status, header, value):
    headers = {"Origin": ORIGINS[0], METHOD: "GET"} | {header: value}
    response = extended_server.http.options("/api/alice/tasks", headers=headers)
    reader = headers["Origin"] if headers["Origin"] in ORIGINS else None
    assert (response.status_code, response.headers.get("access-control-allow-origin")) == (status, reader)
    without_cors = closed.http.options("/api/alice/tasks", headers=headers)
    assert (without_cors.status_code, "access-control-allow-origin" in without_cors.headers) == (405, False)


@pytest.mark.parametrize(("origin", "reader"), [(ORIGINS[0], ORIGINS[0]), (STRANGE_ORIGIN, None)])
def test_allowed_origins_may_read_every_answer_and_others_none(extended_server, database, origin, reader):
    user = User(extended_server.http, "alice", bearer("alice") | {"Origin": origin})
    created = user.send("POST", body={"title": "x"})
    answers = [created, user.send("POST", body={}), user.http.get(user.url, headers={"Origin": origin})]
    answers.append(user.http.get("/broken", headers=user.headers))
    with database.stopped():
        answers.append(user.send("GET"))
    readers = [(each.status_code, each.headers.get("access-control-allow-origin")) for each in answers]
    assert readers == [(status, reader) for status in (201, 400, 401, 500, 500)]
    assert created.headers["access-control-expose-headers"] == "Location"


# Many at once


def test_200_creates_at_once_make_200_tasks_and_of_16_deletes_one_succeeds(alice):
    created = together(lambda number: alice.create(title=str(number)), 200)
    assert sorted(int(each["title"]) for each in created) == list(range(200))
    last, *others = sorted(created, key=lambda each: each["id"], reverse=True)
    alice.owns(last, *others)
    deleted = together(lambda _: alice.send("DELETE", f"/{last['id']}"), 16)
    assert sorted(each.status_code for each in deleted) == [204] + 15 * [404]


def test_of_updates_at_once_the_last_of_each_field_stays(alice, task):
    fields = ["title", "description"]
    updated = together(lambda number: alice.update(task, **{fields[number % 2]: str(number)}), 100)
    stays = alice.read(task)
    for number, field in enumerate(fields):
        last = max(each["updated_at"] for each in updated[number::2])
        assert stays[field] in [each[field] for each in updated[number::2] if each["updated_at"] == last]


# The database


def test_the_database_refuses_what_the_api_refuses(database, alice):
    sql = "INSERT INTO task (user_id, title, description, status) VALUES (%s, %s, %s, %s)"
    row, long = [alice.name, "x", None, "incomplete"], ["n" * 256, "x" * 256, "y" * 5001, "done"]
    database.execute(sql, *row)
    for place, value in [(0, None), (1, None), (1, ""), (3, None), *enumerate(long)]:
        with pytest.raises((psycopg.IntegrityError, psycopg.DataError)):
            database.execute(sql, *row[:place], value, *row[place + 1 :])


def test_the_highest_id_is_the_newest_and_the_key_leads_with_the_owner(alice, database):
    ids = [alice.create()["id"] for _ in range(3)]
    database.execute("UPDATE task SET created_at = now() - id * interval '1 day' WHERE user_id = %s", alice.name)
    assert [each["id"] for each in alice.tasks()] == ids[::-1]
    highest = "INSERT INTO task (id, user_id, title) OVERRIDING SYSTEM VALUE VALUES (2^63::numeric - 1, %s, 'x')"
    database.execute(highest, alice.name)
    assert [each["id"] for each in alice.tasks()] == [2**63 - 1, *ids[::-1]]
    indexes = database.execute("SELECT indexdef FROM pg_indexes WHERE tablename = 'task'")
    assert indexes == [("CREATE UNIQUE INDEX task_pkey ON public.task USING btree (user_id, id)",)]


def test_each_request_is_one_round_trip_a_health_check_none_and_nothing_is_prepared(counted, database):
    user = counted.user()
    assert [user.tasks() for _ in range(8)] == 8 * [[]]
    for method, path in ROUTES:
        path = path.replace("{task_id}", str(user.create()["id"]))
        before = database.statements("counted")
        assert user.send(method, path, {"title": "x"}).is_success
        assert counted.http.get("/health").status_code == 200
        assert database.statements("counted") - before == 1, (method, path)
    assert "execute _pg" not in database.log  # poolers would lose what is prepared


@pytest.fixture(scope="session")
def odd_server(database):
    """The app on a database whose owner, name and settings are unusual."""
    name, settings = "tasks & more", {"client_encoding": "LATIN1", "datestyle": "German", "timezone": "Asia/Kolkata"}
    database.execute(f'CREATE DATABASE "{name}" OWNER "{database.guarded}"')
    for setting, value in settings.items():
        database.execute(f"ALTER DATABASE \"{name}\" SET {setting} = '{value}'")
    user = f"{quote(database.guarded)}:{quote(database.password, safe='')}"
    url = database.url(user, name, application_name="my app")
    with serve("main:app", DATABASE_URL=url, USER_ID_HEADER=HEADER) as server:
        yield server


def test_the_url_is_kept_and_the_settings_of_the_database_do_not_matter(odd_server, database):
    user = odd_server.user()
    task = user.create(title="✓ 💚", description="ż")
    assert (task["title"], task["description"], user.tasks()) == ("✓ 💚", "ż", [task])
    assert abs(seconds_ago(task["created_at"])) < 60
    seen = "SELECT DISTINCT usename, datname FROM pg_stat_activity WHERE application_name = 'my app'"
    assert database.execute(seen) == [(database.guarded, "tasks & more")]


ABORT_TWO_OF_THREE = """
    CREATE SEQUENCE IF NOT EXISTS tries;
    CREATE OR REPLACE FUNCTION abort() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN IF nextval('tries') % 3 <> 0 THEN RAISE SQLSTATE '{}'; END IF; RETURN NEW; END $$;
    CREATE OR REPLACE TRIGGER abort BEFORE INSERT ON task FOR EACH ROW
        WHEN (NEW.title = 'unlucky') EXECUTE FUNCTION abort()
"""


@pytest.mark.parametrize("sqlstate", ["40001", "40P01"])
def test_what_the_database_aborts_for_concurrency_is_run_again(alice, database, sqlstate):
    database.execute(ABORT_TWO_OF_THREE.format(sqlstate))
    alice.owns(alice.create(title="unlucky"))


def test_connections_that_cannot_write_are_renewed(odd_server, database):
    user, alter = odd_server.user(), 'ALTER DATABASE "tasks & more" {} default_transaction_read_only {}'
    database.execute(alter.format("SET", "= on"))
    try:
        database.end_sessions()
        for _ in range(20):
            expect(user.send("POST", body={"title": "x"}), *UNAVAILABLE)
    finally:
        database.execute(alter.format("RESET", ""))
    assert len([user.create() for _ in range(20)]) == len(user.tasks())


@pytest.mark.parametrize("close", [Database.end_sessions, Database.restart])
def test_closed_connections_are_replaced_unnoticed(alice, database, close):
    together(lambda _: alice.tasks(), 20, 20)
    close(database)
    assert len(together(lambda _: alice.create(), 20, 20)) == len(alice.tasks())


def test_a_stopped_database_is_an_error_until_it_is_back(extended_server, database, task):
    user = User(extended_server.http, task["user_id"], bearer(task["user_id"]))
    with database.stopped():
        logged, start = len(extended_server.log), time.monotonic()
        for response in user.ask_everywhere(task["id"]):
            expect(response, *UNAVAILABLE)
        assert time.monotonic() - start < 5
        lines = [line for line in extended_server.log[logged:].splitlines() if not line.startswith("INFO: ")]
        told = re.compile("ERROR: .*Database unavailable: .{,150}Connection refused")
        assert {bool(told.fullmatch(line)) for line in lines} == {True}
        expect(user.send("POST", body={}), 400)
        expect(user.send("GET", "/0"), 400, WRONG_ID)
        assert user.http.get("/health").status_code == 200
    assert user.tasks() == [task]


def test_a_locked_task_holds_up_only_its_own_requests(alice, task, database):
    with ThreadPoolExecutor(50) as pool:
        with database.locked(task):
            waiting = [pool.submit(alice.update, task, title="after")]
            assert wait_until(lambda: database.sessions("server", "active"))
            assert alice.tasks() == [task]
            waiting += [pool.submit(alice.update, task, title="after") for _ in range(49)]
            assert wait_until(lambda: len(database.sessions("server", "active")) >= 20)
            time.sleep(0.2)
            assert len(database.sessions("server")) == 20  # the others queue
            assert not any(each.done() for each in waiting)
            released = datetime.now(UTC).isoformat()
        assert {each.result()["title"] for each in waiting} == {"after"}
        assert min(each.result()["updated_at"] for each in waiting) > released


def impatient():
    import db
    from main import app

    db.TIMEOUT = db.START_PATIENCE = 1  # second, not ten, nor a minute at the start
    return app


impatient_server = shared("impatient", "test_main:impatient", USER_ID_HEADER=HEADER)


def test_who_waits_too_long_for_the_database_is_told_and_nothing_happens_later(impatient_server, alice, task, database):
    user, other = impatient_server.user(alice.name), impatient_server.user()
    with ThreadPoolExecutor(40) as pool, database.locked(task):
        start = time.monotonic()
        waiting = [pool.submit(user.send, "PUT", f"/{task['id']}", {"title": "late"}) for _ in range(40)]
        for each in waiting:
            expect(each.result(), *UNAVAILABLE)
        assert 0.9 < time.monotonic() - start < 3
        assert other.tasks() == []
        assert time.monotonic() - start < 4
        assert database.sessions("impatient", "active") == []
    assert user.tasks() == [task]


def test_a_frozen_session_is_given_up(impatient_server, database):
    user = impatient_server.user()
    together(lambda _: user.tasks(), 20, 20)
    with ExitStack() as stack:
        for pid in database.sessions("impatient")[:3]:
            os.kill(pid, signal.SIGSTOP)
            stack.callback(os.kill, pid, signal.SIGCONT)
        start = time.monotonic()
        answers = together(lambda _: user.send("GET"), 25, 25)
        assert {each.status_code for each in answers} == {200, 500}
        together(lambda _: user.tasks(), 20)
        assert time.monotonic() - start < 4


# Start and stop


def copy_to(folder):
    """The app as it is cloned, with the settings of .env.example."""
    folder.mkdir(parents=True)
    for name in ("main.py", "db.py", "models.py"):
        shutil.copy(HERE / name, folder)
    shutil.copy(HERE / ".env.example", folder / ".env")
    return folder


def output_of(target, **settings):
    """What a function prints in a process of its own."""
    with Program(target, **settings) as program:
        assert program.end(None) == 0, program.log
        return program.log


def import_main():
    warnings.simplefilter("error")
    import main

    main.app.openapi()
    print(main.USER_ID_HEADER)


@ours
def test_importing_reads_settings_and_opens_nothing(tmp_path):
    folder = copy_to(tmp_path / "app")
    assert output_of(import_main, folder=folder, DATABASE_URL="wrong") == "X-User-Id\n"
    assert not (folder / ".postgres").exists()
    (folder / ".env").unlink()
    assert output_of(import_main, folder=folder, USER_ID_HEADER="X-Real") == "X-Real\n"


@ours
def test_render_starts_the_app_as_the_procfile_does():
    assert f"startCommand: {PROCFILE}\n" in (HERE / "render.yaml").read_text()


def test_the_start_waits_for_the_database_unless_a_signal_ends_it(database):
    settings = {"DATABASE_URL": database.url(user="postgres:hunter2"), "USER_ID_HEADER": HEADER}
    with serve("main:app", **settings) as server, ExitStack() as meanwhile:
        meanwhile.enter_context(database.stopped())
        for number in (signal.SIGINT, signal.SIGTERM):
            with serve("main:app", **settings) as other:
                other.wait_for("next try in 1 s")
                assert other.end(number, timeout=0.9) == -number
        server.wait_for("WARNING:  No database yet, next try in 0.5 s: connection failed: ")
        assert "Uvicorn running" not in server.log
        meanwhile.close()
        assert server.user().tasks() == []
        assert "hunter2" not in server.log


@ours
def test_a_start_without_hope_ends_in_one_line(database, tmp_path):
    clone = copy_to(tmp_path / "app")  # whose .env has a URL, which an empty one overrides
    columns = "id bigint, user_id text, title text, status text, created_at timestamptz, updated_at timestamptz"
    for name, table in [("of_others", "id bigint, name text"), ("older", columns)]:
        database.execute(f"CREATE DATABASE {name}")
        database.execute(f"CREATE TABLE task ({table})", name=name)
    database.execute("CREATE DATABASE latin TEMPLATE template0 ENCODING LATIN1 LOCALE 'C'")
    silent, unused = socket.create_server(("127.0.0.1", 0)), free_port()
    local, no_url = "postgresql://u:hunter2@127.0.0.1", "DATABASE_URL is not a PostgreSQL URL: set it to "
    wrong_urls = ["mysql://u:hunter2@localhost/d", "hunter2", "postgresql://u:hunter2%@localhost/d"]
    wrong_urls += ["postgresql://u:p@hunter2@localhost/d", f"{local}:port/d", f"{local}/d?hunter2=1"]
    unusable = {
        f"{local}:{unused}/d": "Connection refused",
        f"{local}:{silent.getsockname()[1]}/d?connect_timeout=2": "timeout expired",
        database.url(f"{quote(database.guarded)}:hunter2"): "password authentication failed for user",
        database.url("postgres:hunter2", "absent"): 'database "absent" does not exist',
        database.url(name="of_others"): "user_id",
        database.url(name="older"): "description",
        database.url(name="latin"): "its encoding is LATIN1, and must be UTF8",
    }
    hopeless = {"": "DATABASE_URL is not set: set it to postgresql://user:"} | dict.fromkeys(wrong_urls, no_url)
    hopeless |= {url: f"The database of DATABASE_URL cannot be used: .*{why}" for url, why in unusable.items()}
    with silent, ExitStack() as stack:
        start = [serve("test_main:impatient", folder=clone, DATABASE_URL=url) for url in hopeless]
        for (url, message), server in zip(hopeless.items(), map(stack.enter_context, start), strict=True):
            assert server.end(None) == 3, server.log
            why, end = re.findall("ERROR:.*", server.log)
            assert re.match(f"ERROR:    db.StartupError: {message}", why)
            assert end == "ERROR:    Application startup failed. Exiting."
            assert re.findall("next try in (.*) s: ", server.log) == ["0.5"] * (str(unused) in url)
            assert not re.search("Traceback|hunter2", server.log)
    (clone / ".postgres").write_text("in the way of the data")
    with serve("main:app", folder=clone, DATABASE_URL="embedded") as server:
        assert server.end(None) == 3
        assert "ERROR:    Application startup failed. Exiting." in server.log


def start_eight_times(urls):
    import db
    from main import app

    async def start():
        async with app.router.lifespan_context(app):
            pass

    children = []
    while len(children) < 8 and (child := os.fork()):
        children.append(child)
    if len(children) < 8:
        for db.DATABASE_URL in urls:
            asyncio.run(start())
        os._exit(0)
    print([os.waitpid(child, 0)[1] for child in children])


def test_eight_processes_may_start_at_once_on_an_empty_database(database):
    names = ["empty_a", "empty_b", "empty_c"]
    for name in names:
        database.execute(f"CREATE DATABASE {name}")
    assert output_of(partial(start_eight_times, [database.url(name=name) for name in names])) == f"{8 * [0]}\n"


@pytest.mark.parametrize(("bound", "status", "title"), [(25, 200, "sent in time"), (1, 500, "Buy groceries")])
def test_requests_in_flight_finish_before_the_server_ends_or_do_not_happen(database, alice, task, bound, status, title):
    settings = {"DATABASE_URL": database.url(application_name="ending"), "USER_ID_HEADER": HEADER}
    with serve("main:app", f"--timeout-graceful-shutdown={bound}", **settings) as server, ThreadPoolExecutor() as pool:
        user = server.user(alice.name)
        with database.locked(task):
            waiting = pool.submit(user.send, "PUT", f"/{task['id']}", {"title": "sent in time"})
            assert wait_until(lambda: database.sessions("ending", "active"))
            ended = server.end(signal.SIGTERM, timeout=0.5 if status == 200 else 6)
            assert ended == (None if status == 200 else -signal.SIGTERM)
        assert server.end(None, timeout=5) == -signal.SIGTERM
        assert waiting.exception() or waiting.result().status_code == status
        assert status == 500 or not re.search("Traceback|ERROR|WARNING", server.log)
    assert alice.tasks()[0]["title"] == title


@pytest.fixture(scope="session")
def clones(tmp_path_factory):
    """Two copies of the app with embedded databases, run by real commands."""
    folders = [copy_to(tmp_path_factory.mktemp("clones") / name) for name in ("a b", f"a {'long' * 40} path")]
    run = partial(serve, "main:app", by_command=True)
    with run("--reload", folder=folders[0]) as one, run("--workers=2", folder=folders[1]) as other:
        yield one, other


@ours
def test_the_embedded_database_lives_with_the_app(clones):
    one, other = clones
    task = one.user("alice").create()
    assert other.user("alice").tasks() == []
    (one.folder / "models.py").touch()
    one.wait_for("Application startup complete", 2)
    assert one.user("alice").tasks() == [task]
    os.killpg(one.process.pid, signal.SIGINT)  # as Ctrl-C does
    other.wait_for("Application startup complete", 2)
    other.end(signal.SIGTERM)
    one.end(None)
    for server in clones:
        assert not re.search("Traceback|ERROR|Warning", server.log)
        assert not (server.folder / ".postgres/postmaster.pid").exists()
        assert server.log.count("Started server process") == server.log.count("Finished server process")


@pytest.fixture(scope="session")
def restarts(tmp_path_factory):
    """The app, ended in bad ways and started again, and a copy of it made while its database runs."""
    folder = copy_to(tmp_path_factory.mktemp("restarts") / "app")
    copied, run = folder.with_name("copy"), partial(serve, "main:app", by_command=True)

    def lists_of_both():
        with run(folder=folder) as server:
            assert wait_until(lambda: list(folder.glob(".postgres-*/base")))  # the data is half made
            os.killpg(server.process.pid, signal.SIGKILL)
        with run(folder=folder) as server:
            lists = [[server.user("alice").create()]]
            server.end(signal.SIGKILL)
        subprocess.run(["cp", "-a", folder, copied], check=True)
        with run(folder=copied) as copy, run(folder=folder) as server:
            copy.user("alice").create()
            with run(folder=folder) as other:  # whose end leaves the database to the first
                lists.append(other.user("alice").tasks())
            return [*lists, server.user("alice").tasks(), copy.user("alice").tasks()[1:]]

    with ThreadPoolExecutor() as pool:
        yield pool.submit(lists_of_both), (folder, copied)


@ours
def test_whatever_ends_the_app_its_data_stays_its_own_and_the_next_end_stops_the_database(restarts):
    lists, folders = restarts
    created, *others = lists.result()
    assert others == 3 * [created]
    for folder in folders:
        assert not (folder / ".postgres/postmaster.pid").exists()
        assert not list(folder.glob(".postgres-*"))


# Hostile clients


@contextmanager
def dialled(server):
    with socket.create_connection((server.http.base_url.host, server.http.base_url.port), timeout=10) as connection:
        yield connection


def head(method, url, *headers):
    lines = [f"{method} {url} HTTP/1.1", "Host: x", "Content-Type: application/json", *headers, "", ""]
    return "\r\n".join(lines).encode()


def test_clients_that_hang_up_leave_nothing_behind(alice, server, task):
    user = f"{HEADER}: {alice.name}"
    asks = head("GET", alice.url, user), head("DELETE", f"{alice.url}/{task['id']}", user)
    post = head("POST", alice.url, user, "Content-Length: 14") + b'{"title": "x"}'
    half = head("PATCH", f"{alice.url}/{task['id']}/complete", user, "Content-Length: 9") + b"{"

    def hang_up(number):
        with dialled(server) as connection:
            connection.sendall([b"", asks[0][:20], asks[0], post[:-9], post, half, asks[1]][number // 50])

    together(hang_up, 350, 50)
    start = time.monotonic()
    together(lambda _: alice.tasks(), 60, 60)
    assert time.monotonic() - start < 3


JUNK = {
    "bytes": bytes(range(256)),
    "TLS": bytes.fromhex("160301020001000001fc0303") + bytes(500),
    "a line without end": b"GET /" + 100_000 * b"x",
    "headers without end": b"GET /health HTTP/1.1\r\nHost: x\r\n" + 10_000 * b"X-More: y\r\n",
    "a wrong length": head("POST", "/api/alice/tasks", "Content-Length: abc"),
    "a wrong chunk": head("POST", "/api/alice/tasks", "Transfer-Encoding: chunked") + b"xyz\r\n",
    "half a body": head("POST", "/api/alice/tasks", "Content-Length: 100") + b"{",
}


@pytest.mark.parametrize("junk", JUNK)
def test_junk_disturbs_nobody_else(extended_server, junk):
    logged, user = len(extended_server.log), User(extended_server.http, "carol", bearer("carol"))
    with dialled(extended_server) as connection:
        connection.sendall(JUNK[junk])
        assert user.tasks() == []
        assert junk in ("a wrong chunk", "half a body") or connection.recv(12) == b"HTTP/1.1 400"
    assert "Traceback" not in extended_server.log[logged:]


def test_a_trailer_names_nobody_and_a_websocket_handshake_is_a_request_like_others(server, closed, alice):
    chunked = head("POST", alice.url, "Transfer-Encoding: chunked", f"Trailer: {HEADER}", "Connection: close")
    with dialled(server) as connection:
        connection.sendall(chunked + b'e\r\n{"title": "x"}\r\n0\r\n' + f"{HEADER}: {alice.name}\r\n\r\n".encode())
        assert connection.recv(12) == b"HTTP/1.1 401"
    assert alice.tasks() == []
    upgrade = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13", "Sec-WebSocket-Key": "x"}
    expect(closed.http.get("/api/alice/tasks", headers=upgrade), *UNAUTHENTICATED)


def test_nothing_of_a_task_is_logged(alice, server):
    alice.create(title="hush", description="hush")
    expect(alice.send("POST", body={"title": "hush" + "x" * 255}), 400)
    assert "hush" not in server.log
