"""The API: its errors, who is asking, and the six routes."""

import os
from collections.abc import AsyncIterator, Mapping
from typing import Annotated, Any
from urllib.parse import quote

import psycopg
from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.middleware import Middleware
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, RedirectResponse, StreamingResponse
from fastapi.security import APIKeyHeader, HTTPBearer
from pydantic import BaseModel, Field
from pydantic.json_schema import SkipJsonSchema
from pydantic_core import to_json
from sqlalchemy import ClauseElement, and_, bindparam, case, delete, func, insert, or_, select, update
from starlette.exceptions import HTTPException
from starlette.routing import Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from db import first_line, logger, open_database, run  # which loads .env
from models import MAX_ID, USER_ID_LENGTH, Status, Task, TaskCreate, TaskPublic, TaskUpdate

USER_ID_HEADER = os.environ.get("USER_ID_HEADER", "").strip()
ORIGINS = [each.strip(" /") for each in os.environ.get("ALLOWED_ORIGINS", "").split(",") if each.strip()]
MAX_BODY = 128 * 1024  # bytes
PAGE = 100  # tasks
CHUNK = 64 * 1024  # bytes of a list that wait here for a slow client


class TaskAPI(FastAPI):
    def build_middleware_stack(self) -> ASGIApp:
        """CORS outermost: an authentication layer sees no preflight, which has no credentials,
        and browsers may read every error, the layer's own and the 500s included."""
        stack = super().build_middleware_stack()
        if not ORIGINS:
            return stack
        return CORSMiddleware(stack, ORIGINS, allow_methods=["*"], allow_headers=["*"], expose_headers=["Location"])


def limit_body(app: ASGIApp) -> ASGIApp:
    """413 when more than MAX_BODY has arrived, as JSON: Starlette's own limit answers in plain text."""

    async def limited(scope: Scope, receive: Receive, send: Send) -> None:
        size = 0

        async def receive_limited() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > MAX_BODY:
                raise HTTPException(413, f"The body is over {MAX_BODY} bytes")
            return message

        await app(scope, receive_limited, send)

    return limited


app = TaskAPI(title="Tasks", lifespan=open_database, middleware=[Middleware(limit_body)], redirect_slashes=False)


class Error(BaseModel):
    error: str


def error_response(status: int, message: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    return JSONResponse({"error": message}, status, headers)


@app.exception_handler(HTTPException)
async def http_error(_: Request, error: HTTPException) -> JSONResponse:
    return error_response(error.status_code, error.detail, error.headers)


@app.exception_handler(405)
async def method_not_allowed(request: Request, error: HTTPException) -> JSONResponse:
    """Names all methods of a task's address, where Starlette names those of one of its routes."""
    routes = [route for route in router.routes if route.matches(request.scope)[0] != Match.NONE]
    methods = {method for route in routes for method in getattr(route, "methods", ())}
    return error_response(405, error.detail, {"Allow": ", ".join(sorted(methods))} if methods else error.headers)


@app.exception_handler(RequestValidationError)
async def invalid_request(_: Request, error: RequestValidationError) -> JSONResponse:
    wrong = [each for each in error.errors() if each["type"] != "none_required"]  # of an Absent
    return error_response(400, "; ".join(map(what_is_wrong, wrong)))


def what_is_wrong(error: dict[str, Any]) -> str:
    """The field as the client named it, and pydantic's words: never what was sent."""
    match error:
        case {"loc": ("body",), "input": bytes()}:  # not parsed: FastAPI parses only what is declared as JSON
            return "Content-Type must be application/json"
        case {"type": "no_changes"}:  # of no field
            return str(error["msg"])
        case {"loc": (_, str(field), *_)}:
            return f"{field}: {error['msg']}"
    return f"body: {error['msg']}"


@app.exception_handler(psycopg.IntegrityError)
async def refused_by_a_constraint(_: Request, error: psycopg.IntegrityError) -> JSONResponse:
    constraint = error.diag.constraint_name or error.diag.message_primary  # Citus has it in the message alone
    return error_response(400, f"Refused by the database: {constraint}")


@app.exception_handler(psycopg.Error)
async def database_unavailable(_: Request, error: psycopg.Error) -> JSONResponse:
    logger.error("Database unavailable: %s", first_line(error))
    return error_response(500, "Database unavailable")


@app.exception_handler(Exception)
async def unforeseen(_: Request, __: Exception) -> JSONResponse:  # the server logs it
    return error_response(500, "Internal server error")


async def current_user(request: Request) -> None:
    """Closes a route to all but the user in its path: whom an authentication layer put into
    `request.state.user_id` or, where there is no layer, the header named by USER_ID_HEADER names."""
    values = request.headers.getlist(USER_ID_HEADER) if USER_ID_HEADER else []
    # Starlette reads headers as latin-1, and paths as UTF-8. What is not UTF-8 becomes surrogates, which no path has.
    named = values[0].encode("latin-1").decode(errors="surrogateescape") if len(values) == 1 else None
    user = getattr(request.state, "user_id", named)
    if not isinstance(user, str) or not user.strip() or len(user) > USER_ID_LENGTH or "\0" in user:
        raise HTTPException(401, "Authentication required", {"WWW-Authenticate": "Bearer"})
    if user != request.path_params["user_id"]:
        raise HTTPException(404)


scheme = APIKeyHeader(name=USER_ID_HEADER, auto_error=False) if USER_ID_HEADER else HTTPBearer(auto_error=False)
router = APIRouter(
    prefix="/api/{user_id:path}/tasks",  # a user id may hold slashes
    dependencies=[Depends(current_user), Depends(scheme)],  # the scheme for the document, and "Authorize" in /docs
    responses={code: {"model": Error} for code in (400, 401, 404, "default")},
    generate_unique_id_function=lambda route: route.name,  # which generated clients call it by
)

UserId = Annotated[str, Field(min_length=1, max_length=USER_ID_LENGTH)]  # current_user has checked that it is theirs
TaskId = Annotated[int, Field(ge=1, le=MAX_ID, json_schema_extra={"format": "int64"})]
Limit = Annotated[int, Field(ge=1, le=PAGE)]
Absent = SkipJsonSchema[None]  # a query cannot say null
LOCATION = {"headers": {"Location": {"description": "The new task's address", "schema": {"type": "string"}}}}

# Built once, because that costs more than running them. INSERT and UPDATE set the columns that `run` is given by name:
# so the owner by whom each task is found is not called user_id there.
tasks = Task.metadata.tables["task"]
public = [tasks.c[name] for name in TaskPublic.model_fields]
owned = tasks.c.user_id == bindparam("owner")
owned_task = and_(owned, tasks.c.id == bindparam("task_id"))
status = bindparam("status", type_=tasks.c.status.type)
on_page = and_(owned, tasks.c.id <= bindparam("up_to"), or_(status.is_(None), tasks.c.status == status))
LIST = select(*public).where(on_page).order_by(tasks.c.id.desc()).limit(bindparam("limit"))
CREATE = insert(tasks).returning(*public)
READ = select(*public).where(owned_task)
DELETE = delete(tasks).where(owned_task).returning(tasks.c.id)
# `now` is read when the row is locked: after the wait for another update. Citus takes no clock elsewhere in an UPDATE.
locked = select(tasks.c.id, func.clock_timestamp().label("now")).where(owned_task).with_for_update().subquery("locked")
completed_at = case((tasks.c.status == "complete", tasks.c.updated_at), else_=locked.c.now)
UPDATE = update(tasks).where(owned_task, tasks.c.id == locked.c.id).values(updated_at=locked.c.now).returning(*public)
COMPLETE = UPDATE.values(status="complete", updated_at=completed_at)


async def one_task(statement: ClauseElement, /, **values: Any) -> dict[str, Any]:
    """The task that the statement returns; 404 if it returns none: it is not there, or somebody else's."""
    if found := await run(statement, **values):
        return found[0]
    raise HTTPException(404, "Task not found")


def as_stored(content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """What the database gave, not validated again: a task from before a rule was changed is shown, too."""
    return Response(to_json(content), status, headers, "application/json")


@router.get("", response_model=list[TaskPublic])
async def list_tasks(
    user_id: UserId, status: Status | Absent = None, limit: Limit | Absent = None, before: TaskId | Absent = None
) -> Response:
    """Newest first. With `limit`, they come in pages: `before` is the last id of the page before."""
    asked = {"owner": user_id, "status": status, "up_to": before - 1 if before else MAX_ID, "limit": limit or PAGE}
    page = await run(LIST, **asked)
    if limit or len(page) < PAGE:
        return as_stored(page)
    return StreamingResponse(all_pages(page, asked), media_type="application/json")


async def all_pages(page: list[dict[str, Any]], asked: dict[str, Any]) -> AsyncIterator[bytes]:
    """`page` and all after it as one array; each is read when the client has taken the one before."""
    text = b"[" + to_json(page)[1:-1]
    while len(page) == PAGE:
        asked["up_to"], page = page[-1]["id"] - 1, []  # while a client reads, only its text is held
        for start in range(0, len(text), CHUNK):
            yield text[start : start + CHUNK]
        page = await run(LIST, **asked)
        text = b"," + to_json(page)[1:-1] if page else b""
    yield text + b"]"


@router.post("", status_code=201, response_model=TaskPublic, responses={201: LOCATION})
async def create_task(user_id: UserId, task: TaskCreate) -> Response:
    """A new task is incomplete. The `Location` header is its address."""
    created = await one_task(CREATE, user_id=user_id, **task.model_dump())
    return as_stored(created, 201, {"Location": f"/api/{quote(user_id, safe='')}/tasks/{created['id']}"})


@router.get("/{task_id}", response_model=TaskPublic)
async def read_task(user_id: UserId, task_id: TaskId) -> Response:
    """One of your tasks."""
    return as_stored(await one_task(READ, owner=user_id, task_id=task_id))


@router.put("/{task_id}", response_model=TaskPublic)
async def update_task(user_id: UserId, task_id: TaskId, changes: TaskUpdate) -> Response:
    """Changes what you send and leaves the rest; a `null` description clears it. The last write wins."""
    return as_stored(await one_task(UPDATE, owner=user_id, task_id=task_id, **changes.model_dump()))


@router.delete("/{task_id}", status_code=204)
async def delete_task(user_id: UserId, task_id: TaskId) -> None:
    """For good: afterwards the task is not found."""
    await one_task(DELETE, owner=user_id, task_id=task_id)


@router.patch("/{task_id}/complete", response_model=TaskPublic)
async def complete_task(user_id: UserId, task_id: TaskId) -> Response:
    """On a complete task this changes nothing, `updated_at` included. A body is ignored."""
    return as_stored(await one_task(COMPLETE, owner=user_id, task_id=task_id))


app.include_router(router)


@app.api_route("/health", methods=["GET", "HEAD"], include_in_schema=False)
async def health() -> dict[str, str]:
    """Asks the database nothing: a sleeping one would be kept awake, and its free hours spent."""
    return {"status": "ok"}


@app.get("/", include_in_schema=False)
async def home() -> RedirectResponse:
    return RedirectResponse("/docs")
