"""The API: its errors, who is asking, and the six routes."""

import json
import re
import traceback
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping, Sequence
from contextlib import ExitStack
from typing import Annotated, Any
from urllib.parse import quote

from fastapi import Depends, FastAPI, Path, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, RedirectResponse
from fastapi.routing import APIRoute
from pydantic import BeforeValidator, TypeAdapter, WithJsonSchema
from sqlalchemy import Row
from sqlalchemy.exc import SQLAlchemyError
from sqlmodel import and_, bindparam, case, delete, func, insert, update
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Match, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from db import StartupError, logger, new_session, open_database, reason, setting
from models import MAX_ID, USER_ID_LENGTH, Error, Status, Task, TaskCreate, TaskPublic, TaskUpdate

TASKS = "/api/{user_id:path}/tasks"  # a user id may hold a slash, so .../tasks/tasks is the list of a user .../tasks
TASK = TASKS + "/{task_id}"
MAX_BODY = 128 * 1024  # bytes


def described(status: int, description: str, example: str) -> dict[int | str, dict[str, Any]]:
    """An error for the OpenAPI document."""
    content = {"application/json": {"example": {"error": example}}}
    return {status: {"model": Error, "description": description, "content": content}}


ERRORS = (
    described(400, "The request is wrong", "Task id must be a positive integer")
    | described(401, "Nobody is authenticated", "Authentication required")
    | described(404, "No such task, or not your path", "Not found")
    | described(500, "The database or the server failed", "Database unavailable")
)
NO_STATUS = described(400, "The request is wrong", "Status must be 'incomplete' or 'complete'")
NO_TITLE = described(400, "The request is wrong", "Title is required")
TOO_LARGE = described(413, "The body is over 128 KiB", "Body must be 128 KiB or less")


class TaskAPI(FastAPI):
    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Has the database open from startup to shutdown, and starts only with it."""
        if scope["type"] != "lifespan":
            await super().__call__(scope, receive, send)
            return
        with ExitStack() as stack:
            try:
                stack.enter_context(open_database())
            except Exception as error:  # noqa: BLE001 (the server logs it and ends)
                # Starlette's own lifespan would show a traceback for what one line explains.
                message = str(error) if isinstance(error, StartupError) else traceback.format_exc()
                await send({"type": "lifespan.startup.failed", "message": message})
                return
            if origins := setting("ALLOWED_ORIGINS"):
                # Outermost: an authentication layer sees no preflight, which has no credentials,
                # and browsers may read every error, the layer's own and the 500s included.
                self.middleware_stack = CORS(self.build_middleware_stack(), origins)
            await super().__call__(scope, receive, send)

    def openapi(self) -> dict[str, Any]:
        """Without FastAPI's 422, which is a 400 here, and with the user header while there is one."""
        document = super().openapi()
        components, header = document["components"], setting("USER_ID_HEADER")
        for operation in (each for path in document["paths"].values() for each in path.values()):
            operation["responses"].pop("422", None)
            if header:
                operation.setdefault("security", [{"user": []}])
        if header:
            scheme = {"type": "apiKey", "in": "header", "name": header}
            components.setdefault("securitySchemes", {})["user"] = scheme
        for unused in ("HTTPValidationError", "ValidationError"):
            components["schemas"].pop(unused, None)
        return document


app = TaskAPI(
    title="Tasks",
    description="To-do tasks of many users. The `user_id` in a path is your own: somebody else's path, and "
    "somebody else's task, do not exist for you. Every error is a sentence, or several joined with `; `.",
    version="1.0.0",
    redirect_slashes=False,
    redoc_url=None,
    generate_unique_id_function=lambda route: route.name,
    responses=ERRORS,
)


class CORS(CORSMiddleware):
    """Lets pages from `origins`, comma-separated, use all of the API."""

    def __init__(self, app: ASGIApp, origins: str) -> None:
        super().__init__(
            app,
            allow_origins=[origin.strip().rstrip("/") for origin in origins.split(",") if origin.strip()],
            allow_methods=["GET", "POST", "PUT", "PATCH", "DELETE"],
            allow_headers=list(filter(None, ["Authorization", "Content-Type", setting("USER_ID_HEADER")])),
            expose_headers=["Location"],
        )

    def preflight_response(self, request_headers: Headers) -> Response:
        response = super().preflight_response(request_headers)
        if response.status_code == 200:
            return response
        return error_response(400, "Origin, method or headers not allowed")  # Starlette's is plain text


def error_response(status: int, message: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    return JSONResponse({"error": message}, status, headers)


@app.exception_handler(HTTPException)
async def http_error(request: Request, error: HTTPException) -> Response:
    headers = dict(error.headers or {})
    if error.status_code == 405:  # Starlette names the methods of one route, and a path has several
        matching = [
            each for each in app.routes if isinstance(each, Route) and each.matches(request.scope)[0] != Match.NONE
        ]
        headers["Allow"] = ", ".join(sorted({method for route in matching for method in route.methods or ()}))
    message = "Not found" if error.detail == "Not Found" else error.detail  # Starlette's own 404
    return error_response(error.status_code, message, headers)


@app.exception_handler(RequestValidationError)
async def request_error(request: Request, error: RequestValidationError) -> Response:
    return error_response(400, "; ".join(sentence(each, request.method) for each in error.errors()))


@app.exception_handler(SQLAlchemyError)
async def database_error(_: Request, error: SQLAlchemyError) -> Response:
    logger.error("Database unavailable: %s", reason(error))
    return error_response(500, "Database unavailable")


@app.exception_handler(Exception)
async def unforeseen_error(*_: object) -> Response:
    return error_response(500, "Internal server error")  # the server logs the cause


STRING_ERRORS = {
    "string_type": "{} must be a string",
    "string_too_short": "{} cannot be empty",
    "string_too_long": "{} must be {max_length} characters or less",
    "string_pattern_mismatch": "{} must not contain NUL characters",
    "string_unicode": "{} must not contain lone surrogates",
}


def sentence(error: Mapping[str, Any], method: str) -> str:
    """Says what is wrong, and never what was sent."""
    kind, field, sent = error["type"], error["loc"][-1], error["input"]
    if kind == "no_changes":
        return str(error["msg"])
    if field == "body":
        # FastAPI leaves what is not declared as JSON in bytes.
        return "Content-Type must be application/json" if isinstance(sent, bytes) else "Body must be a JSON object"
    if field == "task_id":
        return "Task id must be a positive integer"
    if field == "status":
        return "Status must be 'incomplete' or 'complete'"
    if field == "title" and (sent is None or kind in ("missing", "string_too_short")):
        return "Title is required" if method == "POST" else "Title cannot be empty"
    return STRING_ERRORS[kind].format(field.capitalize(), **error.get("ctx", {}))


class JSONRequest(Request):
    """A request whose body is JSON as in RFC 8259, in UTF-8 and without NaN, within MAX_BODY."""

    decoder = json.JSONDecoder(parse_constant=int)  # int refuses NaN and Infinity

    async def stream(self) -> AsyncGenerator[bytes, None]:
        declared, received = int(self.headers.get("content-length", 0)), 0
        refuse_large(declared)
        async for chunk in super().stream():
            received += len(chunk)
            refuse_large(received)
            yield chunk

    async def json(self) -> Any:
        try:
            return self.decoder.decode((await self.body()).decode())
        except (ValueError, RecursionError):
            raise HTTPException(400, "Body must be valid JSON") from None


def refuse_large(size: int) -> None:
    if size > MAX_BODY:
        raise HTTPException(413, "Body must be 128 KiB or less")


class JSONRoute(APIRoute):
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        # Starlette's $ and . take line breaks for something special: /health%0A would be /health.
        self.path_regex = re.compile(self.path_regex.pattern.removesuffix("$") + r"\Z", re.DOTALL)

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_json(request: Request) -> Response:
            return await handle(JSONRequest(request.scope, request.receive))

        return handle_json


app.router.route_class = JSONRoute


def authenticated_user(request: Request) -> str | None:
    """The user that an authentication layer put into `request.state.user_id`; where there is no
    layer, the value of the header named by USER_ID_HEADER. None for what cannot be a user id."""
    if hasattr(request.state, "user_id"):
        user = request.state.user_id
    else:
        name = setting("USER_ID_HEADER").lower().encode()
        values = [value for key, value in request.headers.raw if key == name]
        # UTF-8, as the path is; other bytes become surrogates, which no path has.
        user = values[0].decode("utf-8", "surrogateescape") if len(values) == 1 else None
    if isinstance(user, str) and user.strip() and len(user) <= USER_ID_LENGTH and "\0" not in user:
        return user
    return None


PathUserId = Annotated[
    str,
    # Only described, not checked: a path that is not the user's own is a 404, however long.
    Path(description="Your own user id", json_schema_extra={"minLength": 1, "maxLength": USER_ID_LENGTH}),
]


async def current_user(request: Request, user_id: PathUserId) -> str:
    """The authenticated user, whom the path must name: 401 without one, 404 on another's path."""
    user = authenticated_user(request)
    if user is None:
        raise HTTPException(401, "Authentication required", {"WWW-Authenticate": "Bearer"})
    if user != user_id:
        raise HTTPException(404, "Not found")
    return user


def plain_decimal(value: str) -> str:
    """int alone would also take +1, 01 and 1_0."""
    if not re.fullmatch("[1-9][0-9]*", value):
        raise ValueError
    return value


# The user who asks, and whose tasks these are: a route with this parameter is closed to all others.
UserId = Annotated[str, Depends(current_user)]
TaskId = Annotated[int, Path(ge=1, le=MAX_ID), BeforeValidator(plain_decimal)]
StatusFilter = Annotated[
    Status | None,
    Query(description="Only the tasks with this status"),
    WithJsonSchema(TypeAdapter(Status).json_schema()),  # a query cannot say null
]

# Built once, because that costs more than running them. Each starts from the owner.
tasks = Task.metadata.tables["task"]
owned = tasks.c.user_id == bindparam("owner")
owned_task = and_(owned, tasks.c.id == bindparam("task_id"))
now = func.clock_timestamp()  # now() would date an update that waited for another before it

LIST = tasks.select().where(owned).order_by(tasks.c.id.desc())
LIST_BY_STATUS = LIST.where(tasks.c.status == bindparam("status"))
CREATE = insert(tasks).returning(tasks)
READ = tasks.select().where(owned_task)
UPDATE = update(tasks).where(owned_task).values(updated_at=now).returning(tasks)
DELETE = delete(tasks).where(owned_task).returning(tasks.c.id)
COMPLETE = (
    update(tasks)
    .where(owned_task)
    .values(status="complete", updated_at=case((tasks.c.status == "complete", tasks.c.updated_at), else_=now))
    .returning(tasks)
)

PUBLIC = TypeAdapter(TaskPublic)


def run(statement: Any, **values: Any) -> Sequence[Row[Any]]:
    with new_session() as session:
        found: Sequence[Row[Any]] = session.exec(statement, params=values).all()
    return found


def run_for_one(statement: Any, **values: Any) -> Row[Any]:
    """The task that the statement found; 404 if it found none, or the task is somebody else's."""
    found = run(statement, **values)
    if not found:
        raise HTTPException(404, "Task not found")
    return found[0]


def public(task: Row[Any]) -> bytes:
    return PUBLIC.dump_json(PUBLIC.validate_python(task))


def answer(content: bytes, **options: Any) -> Response:
    """JSON that the route made itself, in its own thread: FastAPI would hop to another one for it."""
    return Response(content, media_type="application/json", **options)


@app.get(TASKS, response_model=list[TaskPublic], responses=NO_STATUS)
def list_tasks(user: UserId, status: StatusFilter = None) -> Response:
    """Your tasks, newest first."""
    found = run(LIST_BY_STATUS, owner=user, status=status) if status else run(LIST, owner=user)
    return answer(b"[" + b",".join(map(public, found)) + b"]")  # one by one, which leaves no memory behind


@app.post(TASKS, response_model=TaskPublic, responses=NO_TITLE | TOO_LARGE, status_code=201)
def create_task(user: UserId, task: TaskCreate) -> Response:
    """A new task is incomplete. The `Location` header is its address."""
    created = run_for_one(CREATE, user_id=user, title=task.title, description=task.description)
    location = f"/api/{quote(user, safe='')}/tasks/{created.id}"
    return answer(public(created), status_code=201, headers={"Location": location})


@app.get(TASK, response_model=TaskPublic)
def read_task(user: UserId, task_id: TaskId) -> Response:
    """One of your tasks."""
    return answer(public(run_for_one(READ, owner=user, task_id=task_id)))


@app.put(TASK, response_model=TaskPublic, responses=TOO_LARGE)
def update_task(user: UserId, task_id: TaskId, changes: TaskUpdate) -> Response:
    """Changes what you send and leaves the rest; a `null` description clears it. The last write wins."""
    sent = changes.model_dump(exclude_unset=True)
    return answer(public(run_for_one(UPDATE, owner=user, task_id=task_id, **sent)))


@app.delete(TASK, status_code=204)
def delete_task(user: UserId, task_id: TaskId) -> None:
    """For good: afterwards the task is not found."""
    run_for_one(DELETE, owner=user, task_id=task_id)


@app.patch(TASK + "/complete", response_model=TaskPublic)
def complete_task(user: UserId, task_id: TaskId) -> Response:
    """On a complete task this changes nothing, `updated_at` included. A body is ignored."""
    return answer(public(run_for_one(COMPLETE, owner=user, task_id=task_id)))


@app.get("/health", include_in_schema=False)
async def health() -> dict[str, str]:
    """Asks the database nothing: a sleeping one would be kept awake, and its free hours spent."""
    return {"status": "ok"}


@app.get("/", include_in_schema=False)
async def home() -> RedirectResponse:
    return RedirectResponse("/docs")
