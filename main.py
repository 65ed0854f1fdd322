"""What the API does: who is asking, the six routes, how errors look."""

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from functools import lru_cache
from typing import Annotated, Any
from urllib.parse import quote
from uuid import UUID

import psycopg
from fastapi import APIRouter, Depends, FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, RedirectResponse, StreamingResponse
from fastapi.routing import iter_route_contexts
from fastapi.security import APIKeyHeader, HTTPBearer
from fastapi.security.base import SecurityBase
from pydantic import MISSING, BaseModel, Field
from pydantic_core import to_json
from sqlalchemy import (
    ClauseElement,
    Insert,
    Select,
    Update,
    bindparam,
    delete,
    func,
    insert,
    select,
    update,
)
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.routing import Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from db import ALLOWED_ORIGINS, DATABASE_URL, USER_ID_HEADER, first_line, logger, open_database, run
from models import USER_ID_LENGTH, Status, Task, TaskCreate, TaskId, TaskPublic, TaskUpdate

# Bytes. The longest title and description always fit, even with each character as \uXXXX\uXXXX.
MAX_BODY = 128 * 1024
# Tasks that a client may ask for at once.
MAX_LIMIT = 100
# Tasks that are read at once, by one statement, for a list without a limit.
PAGE = 50
# Tasks of a page that are sent at once.
PIECE = 5


# Who is asking


async def current_user(request: Request) -> Any:
    """Who is asking: what a middleware put into `request.state.user_id`, or else the request
    header that USER_ID_HEADER names. None is nobody.

    To ask a dependency of yours instead: `app.dependency_overrides[current_user] = yours`.
    """
    if hasattr(request.state, "user_id"):
        return request.state.user_id
    values = request.headers.getlist(USER_ID_HEADER) if USER_ID_HEADER else []
    return as_utf8(values[0]) if len(values) == 1 else None


def as_utf8(header: str) -> str:
    # uvicorn decodes the path as UTF-8. Starlette decodes headers as Latin-1: Zoë comes as "ZoÃ«".
    # Bytes that are not UTF-8 become surrogates here, which no path has.
    return header.encode("latin-1").decode(errors="surrogateescape")


def as_user_id(user: Any) -> str | None:
    """The user id in what current_user returned: a string, an int or a UUID. None is nobody."""
    if user is None:
        return None
    # In Python, a bool is an int, too.
    if isinstance(user, int | UUID) and not isinstance(user, bool):
        user = str(user)
    if not isinstance(user, str):
        logger.error("A user id is a string, an int or a UUID, not a %s", type(user).__name__)
        return None
    is_blank = not user.strip()
    if is_blank or len(user) > USER_ID_LENGTH or "\0" in user:
        return None
    return user


scheme: APIKeyHeader | HTTPBearer
if USER_ID_HEADER:
    HOW_TO_AUTHENTICATE = f"The header `{USER_ID_HEADER}` says who is asking."
    scheme = APIKeyHeader(name=USER_ID_HEADER)
else:
    HOW_TO_AUTHENTICATE = "A token says who is asking: `Authorization: Bearer …`."
    scheme = HTTPBearer()


class OwnerOnly(SecurityBase):
    """Closes a route to all but the user in its path, whatever replaces current_user.

    As a SecurityBase, it also says in the OpenAPI document how to authenticate, for "Authorize" in
    /docs and for generated clients. (A second dependency for that would take 3% more CPU.)
    """

    # What FastAPI takes into the document.
    model = scheme.model
    scheme_name = scheme.scheme_name

    async def __call__(self, request: Request, user: Annotated[Any, Depends(current_user)]) -> None:
        user_id = as_user_id(user)
        if user_id is None:
            raise HTTPException(401, "Authentication required", {"WWW-Authenticate": "Bearer"})
        if user_id != request.path_params["user_id"]:
            # The same answer as for any unknown path.
            raise HTTPException(404)


# The API


class ErrorResponse(BaseModel):
    error: str


router = APIRouter(
    # A user id may hold slashes, and even "/tasks": the last one in the path counts.
    prefix="/api/{user_id:path}/tasks",
    dependencies=[Depends(OwnerOnly())],
    # "default" keeps FastAPI from adding a 422, which is a 400 here.
    responses={status: {"model": ErrorResponse} for status in (400, 401, 404, "default")},
    tags=["tasks"],
    # Generated clients name their functions after ours.
    generate_unique_id_function=lambda route: route.name,
)


# The statements. Each is made once, as a constant or by a cached function, because db.py compiles
# each object once. Their parameters (`bindparam`) get values in run().

# SQLAlchemy Core's table: the ORM has no part in these statements.
tasks = Task.metadata.tables["task"]
PUBLIC = [tasks.c[name] for name in TaskPublic.model_fields]
OWNED = tasks.c.user_id == bindparam("user_id")
ONE_TASK = OWNED & (tasks.c.id == bindparam("task_id"))

LIST = select(*PUBLIC).where(OWNED).order_by(tasks.c.id.desc()).limit(bindparam("limit"))
CREATE = insert(tasks).returning(*PUBLIC)
READ = select(*PUBLIC).where(ONE_TASK)
# now() is when the statement began (in autocommit). If it began at 12:00:00, and waited for another
# update of the task that began at 12:00:01, updated_at stays at 12:00:01.
UPDATE = (
    update(tasks)
    .where(ONE_TASK)
    .values(updated_at=func.greatest(tasks.c.updated_at, func.now()))
    .returning(*PUBLIC)
)
# In SQL: (SELECT now() WHERE task.status != 'complete'). For a complete task it is NULL, which
# greatest() ignores. A CASE would be plainer, but Citus refuses now() in a CASE.
# correlate() makes `task` the row that is updated. Otherwise SQLAlchemy would add FROM task.
NOW_UNLESS_COMPLETE = (
    select(func.now()).where(tasks.c.status != Status.COMPLETE).correlate(tasks).scalar_subquery()
)
# UPDATE with another updated_at: a second values() replaces what the first one says of a column.
COMPLETE = UPDATE.values(
    status=Status.COMPLETE, updated_at=func.greatest(tasks.c.updated_at, NOW_UNLESS_COMPLETE)
)
DELETE = delete(tasks).where(ONE_TASK).returning(tasks.c.id)

# What a list may be filtered by. A name is that of a field of TaskQuery and of a parameter.
FILTERS = {
    "status": tasks.c.status == bindparam("status"),
    "before": tasks.c.id < bindparam("before"),
}


@lru_cache
def list_by(*names: str) -> Select[Any]:
    """LIST with the filters of these names."""
    return LIST.where(*[FILTERS[name] for name in names])


@lru_cache
def with_values(statement: Insert | Update, *columns: str) -> Insert | Update:
    """CREATE or UPDATE, which sets these columns to parameters of the same names.

    with_values(UPDATE, "title") is UPDATE task SET title = :title, updated_at = greatest(…) …
    """
    return statement.values({column: bindparam(column) for column in columns})


async def one_task(statement: ClauseElement, /, **values: Any) -> dict[str, Any]:
    """The task that the statement returns. 404 if there is none, or it is somebody else's."""
    rows = await run(statement, **values)
    if not rows:
        raise HTTPException(404, "Task not found")
    return rows[0]


# The routes

# These bounds are for the OpenAPI document: OwnerOnly has checked the user in the path.
UserId = Annotated[str, Field(min_length=1, max_length=USER_ID_LENGTH)]
Limit = Annotated[int, Field(ge=1, le=MAX_LIMIT)]


class TaskQuery(BaseModel):
    """What a list may be asked for. What was not sent is MISSING, and not in model_dump()."""

    status: Status | MISSING = Field(MISSING, description="Only tasks with this status.")
    limit: Limit | MISSING = Field(
        MISSING, description="The most tasks to return. Without it, all."
    )
    before: TaskId | MISSING = Field(
        MISSING, description="Only tasks with a smaller id: the last id of the page before."
    )


class TaskResponse(JSONResponse):
    """One task or several, as stored. They are not validated: a row may be older than a rule."""

    def render(self, content: Any) -> bytes:
        return to_json(content)


@router.get("", response_model=list[TaskPublic])
async def list_tasks(user_id: UserId, query: Annotated[TaskQuery, Query()]) -> Response:
    """Newest first. With `limit` they come in pages: `before` is the last id of the page before."""
    # The filters that were sent, once the limit is out.
    filters = query.model_dump()
    limit = filters.pop("limit", None)
    page = await run(list_by(*filters), user_id=user_id, limit=limit or PAGE, **filters)
    is_whole_answer = limit is not None or len(page) < PAGE
    if is_whole_answer:
        return TaskResponse(page)
    array = json_array(page, user_id, filters)
    return StreamingResponse(array, media_type="application/json")


async def json_array(
    page: list[dict[str, Any]], user_id: str, filters: dict[str, Any]
) -> AsyncIterator[bytes]:
    """The tasks of `page` and of all pages after it, as one JSON array, in pieces.

    A page is emptied while it is sent, because the client may stop reading at any piece.
    """
    yield b"["
    separator = b""
    while page:
        is_last_page = len(page) < PAGE
        filters = filters | {"before": page[-1]["id"]}
        while page:
            yield separator + b",".join(to_json(task) for task in page[:PIECE])
            separator = b","
            del page[:PIECE]
        if is_last_page:
            break
        page = await run(list_by(*filters), user_id=user_id, limit=PAGE, **filters)
    yield b"]"


@router.post(
    "",
    status_code=201,
    response_model=TaskPublic,
    responses={
        201: {
            "headers": {
                "Location": {"description": "The new task's address", "schema": {"type": "string"}}
            }
        }
    },
)
async def create_task(user_id: UserId, task: TaskCreate) -> Response:
    """A new task is incomplete. The `Location` header is its address."""
    values = {"user_id": user_id, **task.model_dump()}
    created = await one_task(with_values(CREATE, *values), **values)
    location = f"/api/{quote(user_id, safe='')}/tasks/{created['id']}"
    return TaskResponse(created, 201, {"Location": location})


@router.get("/{task_id}", response_model=TaskPublic)
async def read_task(user_id: UserId, task_id: TaskId) -> Response:
    """One of your tasks."""
    return TaskResponse(await one_task(READ, user_id=user_id, task_id=task_id))


@router.put("/{task_id}", response_model=TaskPublic)
async def update_task(user_id: UserId, task_id: TaskId, task: TaskUpdate) -> Response:
    """Changes what you send. A `null` description clears it. The last write wins."""
    changes = task.model_dump()
    statement = with_values(UPDATE, *changes)
    return TaskResponse(await one_task(statement, user_id=user_id, task_id=task_id, **changes))


# With FastAPI's default, JSONResponse, the empty body would have the Content-Type application/json.
@router.delete("/{task_id}", status_code=204, response_class=Response)
async def delete_task(user_id: UserId, task_id: TaskId) -> None:
    """Deletes it for good: afterwards the task is not found."""
    await one_task(DELETE, user_id=user_id, task_id=task_id)


@router.patch("/{task_id}/complete", response_model=TaskPublic)
async def complete_task(user_id: UserId, task_id: TaskId) -> Response:
    """On a complete task this changes nothing, `updated_at` included. A body is ignored."""
    return TaskResponse(await one_task(COMPLETE, user_id=user_id, task_id=task_id))


# How errors look


def error_response(
    status: int, detail: Any, headers: Mapping[str, str] | None = None
) -> JSONResponse:
    """`{"error": "…"}`. A detail that is no string, of somebody's HTTPException, becomes JSON."""
    text = detail if isinstance(detail, str) else to_json(detail, fallback=str).decode()
    return JSONResponse({"error": text}, status, headers)


async def http_error(_: Request, error: HTTPException) -> JSONResponse:
    return error_response(error.status_code, error.detail, error.headers)


async def method_not_allowed(request: Request, error: HTTPException) -> JSONResponse:
    """Names all methods of the path. Starlette names those of one route, and each of ours has one.

    An error that a route or a mounted app has raised itself keeps its headers.
    """
    methods: set[str] = set()
    # All routes, with those of included routers.
    for route in iter_route_contexts(request.app.routes):
        match, _ = route.matches(request.scope)
        # FULL: the path and the method fit, so this route has run, and has raised the error.
        if match == Match.FULL:
            return await http_error(request, error)
        # PARTIAL: only the path fits.
        if match == Match.PARTIAL:
            methods |= route.methods or set()
    # Nothing fits when a mounted app has raised the error, because its mount has changed the scope.
    if not methods:
        return await http_error(request, error)
    return error_response(405, error.detail, {"Allow": ", ".join(sorted(methods))})


async def invalid_request(_: Request, error: RequestValidationError) -> JSONResponse:
    return error_response(400, "; ".join(what_is_wrong(each) for each in error.errors()))


def what_is_wrong(error: dict[str, Any]) -> str:
    """The field as the client named it, and pydantic's words: never what was sent."""
    message = str(error["msg"])
    if error["loc"] == ("body",) and isinstance(error["input"], bytes):
        # FastAPI parses only a body that is declared as JSON. Any other one stays bytes.
        return "Content-Type must be application/json"
    if error["type"] == "no_changes":
        # TaskUpdate's, which is about no single field.
        return message
    # ("body", "title"), ("query", "limit"), or ("body", 17) for JSON that ends at character 17.
    source, *path = error["loc"]
    field = path[0] if path and isinstance(path[0], str) else source
    return f"{field}: {message}"


async def refused_by_a_constraint(_: Request, error: psycopg.IntegrityError) -> JSONResponse:
    # Citus names the constraint in the message alone.
    constraint = error.diag.constraint_name or error.diag.message_primary
    return error_response(400, f"Refused by the database: {constraint}")


async def wrong_statement(_: Request, error: psycopg.ProgrammingError) -> JSONResponse:
    logger.error("A wrong statement: %s: %s", type(error).__name__, first_line(error))
    return error_response(500, "Internal server error")


async def wrong_value(_: Request, error: psycopg.DataError) -> JSONResponse:
    # Its text may quote the value.
    logger.error("A wrong value for the database: %s", type(error).__name__)
    return error_response(500, "Internal server error")


async def database_unavailable(_: Request, error: psycopg.Error) -> JSONResponse:
    logger.error("Database unavailable: %s", first_line(error))
    return error_response(500, "Database unavailable")


async def unforeseen(_: Request, __: Exception) -> JSONResponse:
    # After this answer, Starlette raises the error again, and uvicorn logs it.
    return error_response(500, "Internal server error")


# The app


class TaskAPI(FastAPI):
    def build_middleware_stack(self) -> ASGIApp:
        # From the outside to the inside, where each hands a request on to the next:
        #
        #   CORSMiddleware
        #   NoStore
        #   Starlette's ServerErrorMiddleware, which calls unforeseen()
        #   what add_middleware() adds: an authentication of yours, BodyLimit
        #   Starlette's ExceptionMiddleware, which calls the other exception handlers
        #   the routes
        #
        # So every answer has the headers of the first two, which add_middleware() could not put
        # there. And CORS answers preflight requests, which have no credentials, before any
        # authentication.
        stack: ASGIApp = NoStore(super().build_middleware_stack())
        if ALLOWED_ORIGINS:
            stack = CORSMiddleware(
                stack,
                ALLOWED_ORIGINS,
                allow_methods=["*"],
                allow_headers=["*"],
                # Credentials are cookies. With *, any page could use its visitors' cookies.
                allow_credentials="*" not in ALLOWED_ORIGINS,
                expose_headers=["Location"],
            )
        return stack


class NoStore:
    """Forbids caches to keep an answer.

    A shared cache knows nothing of the header that names the user, and would show one user's tasks
    to another.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_uncached(message: Message) -> None:
            if message["type"] == "http.response.start":
                message.setdefault("headers", [])
                MutableHeaders(scope=message)["Cache-Control"] = "no-store"
            await send(message)

        await self.app(scope, receive, send_uncached)


class BodyLimit:
    """Ends a request whose body is over MAX_BODY, when that much has arrived.

    FastAPI calls receive_limited() where it reads the body for a route, and passes an HTTPException
    on to http_error(). FastAPI's own max_body_size answers a declared length in plain text.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        size = 0

        async def receive_limited() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > MAX_BODY:
                raise HTTPException(413, f"The body is over {MAX_BODY} bytes")
            return message

        await self.app(scope, receive_limited, send)


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    # With the embedded database, this is a developer's own machine.
    if USER_ID_HEADER and DATABASE_URL != "embedded":
        logger.warning(
            "USER_ID_HEADER is set: let only a proxy that sets %s reach this app. "
            "Anybody else who reaches it can be any user.",
            USER_ID_HEADER,
        )
    async with open_database():
        yield


PATHS = "`{user_id}` in a path is the authenticated user."
ERRORS = 'Every error is `{"error": "…"}`.'
app = TaskAPI(
    title="Tasks",
    description=f"Each user's own to-do list. {HOW_TO_AUTHENTICATE} {PATHS} {ERRORS}",
    lifespan=lifespan,
    redirect_slashes=False,
    # Starlette looks for the error's status first, then for its class, then for that one's bases.
    # The order here does not matter.
    exception_handlers={
        HTTPException: http_error,
        405: method_not_allowed,
        RequestValidationError: invalid_request,
        psycopg.IntegrityError: refused_by_a_constraint,
        psycopg.ProgrammingError: wrong_statement,
        psycopg.DataError: wrong_value,
        psycopg.Error: database_unavailable,
        Exception: unforeseen,
    },
)
app.add_middleware(BodyLimit)
app.include_router(router)


@app.api_route("/health", methods=["GET", "HEAD"], include_in_schema=False)
async def health() -> dict[str, str]:
    """Asks the database nothing: that would keep a sleeping one awake, and spend its free hours."""
    return {"status": "ok"}


@app.get("/", include_in_schema=False)
async def home() -> RedirectResponse:
    return RedirectResponse("/docs")
