"""The API: its errors, who is asking, and the six routes."""

import asyncio
import os
import re
from collections.abc import AsyncIterator
from typing import Annotated, Any
from urllib.parse import quote

from fastapi import Depends, FastAPI, Path, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, RedirectResponse, StreamingResponse
from fastapi.security import APIKeyHeader, HTTPBearer
from fastapi.security.base import SecurityBase
from pydantic import BeforeValidator, Field
from pydantic.json_schema import SkipJsonSchema
from pydantic_core import to_json
from sqlalchemy import Executable, and_, bindparam, case, delete, func, insert, select, update
from sqlalchemy.exc import SQLAlchemyError
from starlette.convertors import PathConvertor, register_url_convertor
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.routing import Match, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from db import logger, open_database, reason, run  # and .env, which db loads
from models import MAX_ID, USER_ID_LENGTH, WRONG, Error, Status, Task, TaskCreate, TaskPublic, TaskUpdate, sentence

USER_ID_HEADER = os.environ.get("USER_ID_HEADER", "").strip()
ALLOWED_ORIGINS = [each.rstrip("/") for each in os.environ.get("ALLOWED_ORIGINS", "").replace(",", " ").split()]
MAX_BODY = 128 * 1024  # bytes
PAGE = 100  # tasks
CHUNK = 64 * 1024  # bytes: handed over whole, a page that nobody reads would be held twice
page_turn = asyncio.Semaphore(4)  # long lists leave most connections to short requests


class TaskAPI(FastAPI):
    def build_middleware_stack(self) -> ASGIApp:
        """CORS outermost: an authentication layer sees no preflight, which has no credentials,
        and browsers may read every error, the layer's own and the 500s included."""
        stack = super().build_middleware_stack()
        if not ALLOWED_ORIGINS:
            return stack
        return CORSMiddleware(
            stack,
            allow_origins=ALLOWED_ORIGINS,
            allow_methods=["GET", "POST", "PUT", "PATCH", "DELETE"],
            allow_headers=["Authorization", "Content-Type", *filter(None, [USER_ID_HEADER])],
            expose_headers=["Location"],
        )


def says(message: str) -> dict[str, Any]:
    return {"model": Error, "content": {"application/json": {"example": {"error": message}}}}


app = TaskAPI(
    title="Tasks",
    description="To-do tasks of many users. The `user_id` in a path is your own: somebody else's path, and "
    "somebody else's task, do not exist for you. Every error is a sentence, or several joined with `; `.",
    version="1.0.0",
    lifespan=open_database,
    redirect_slashes=False,
    redoc_url=None,
    generate_unique_id_function=lambda route: route.name,
    responses={
        400: says(WRONG["task_id"]),
        401: says("Authentication required"),
        404: says("Task not found"),
        "default": says("Database unavailable"),
    },
)


@app.exception_handler(HTTPException)
@app.exception_handler(RequestValidationError)
@app.exception_handler(ClientDisconnect)
@app.exception_handler(SQLAlchemyError)
@app.exception_handler(Exception)
async def error_response(request: Request, error: Exception) -> JSONResponse:
    headers = getattr(error, "headers", None)
    match error:
        case HTTPException():
            # Starlette's own 404 says "Not Found".
            status, message = error.status_code, "Not found" if error.detail == "Not Found" else error.detail
            if status == 405:  # where Starlette names the methods of one route, and a path may have several
                matching = [each for each in app.routes if each.matches(request.scope)[0] != Match.NONE]
                methods = {method for each in matching if isinstance(each, Route) for method in each.methods or ()}
                headers = {"Allow": ", ".join(sorted(methods))}
        case RequestValidationError():
            sentences = [sentence(each, request.method) for each in error.errors()]
            status, message = 400, "; ".join(dict.fromkeys(sentences))
        case ClientDisconnect():
            status, message = 400, "Body is incomplete"  # nobody hears it, but the log has no traceback
        case SQLAlchemyError():
            status, message = 500, "Database unavailable"
            logger.error("%s: %s", message, reason(error))
        case _:  # which the server logs
            status, message = 500, "Internal server error"
    return JSONResponse({"error": message}, status, headers)


def limit_body(app: ASGIApp) -> ASGIApp:
    """Ends a request when more than MAX_BODY of its body has arrived, with JSON, which Starlette's own does not."""

    async def limited(scope: Scope, receive: Receive, send: Send) -> None:
        size = 0

        async def receive_limited() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > MAX_BODY:
                raise HTTPException(413, "Body must be 128 KiB or less")
            return message

        await app(scope, receive_limited, send)

    return limited


app.add_middleware(limit_body)


class AnyConvertor(PathConvertor):
    regex = "(?s:.*)"  # a user id may hold slashes, which `path` takes too, and line breaks


register_url_convertor("any", AnyConvertor())
TASKS = "/api/{user_id:any}/tasks"  # .../tasks/tasks is the list of a user .../tasks
TASK = TASKS + "/{task_id}"

# Described, not checked: a path that is not the user's own is a 404, however long.
PathUserId = Annotated[str, Path(json_schema_extra={"minLength": 1, "maxLength": USER_ID_LENGTH})]


class CurrentUser(SecurityBase):
    """The user that an authentication layer put into `request.state.user_id`; where there is no
    layer, the value of the header named by USER_ID_HEADER. 401 without one, 404 on another's path."""

    # For the OpenAPI document. A dependency on the scheme would run it in each request, for nothing.
    scheme = APIKeyHeader(name=USER_ID_HEADER) if USER_ID_HEADER else HTTPBearer()
    model, scheme_name = scheme.model, scheme.scheme_name
    challenge = "APIKey" if USER_ID_HEADER else "Bearer"

    async def __call__(self, request: Request, user_id: PathUserId) -> str:
        if "user_id" in request.state:
            user = request.state.user_id
        else:
            values = request.headers.getlist(USER_ID_HEADER) if USER_ID_HEADER else []
            # UTF-8, as the path is; other bytes become surrogates, which no path has.
            user = values[0].encode("latin-1").decode(errors="surrogateescape") if len(values) == 1 else None
        if not isinstance(user, str) or not user.strip() or len(user) > USER_ID_LENGTH or "\0" in user:
            raise HTTPException(401, "Authentication required", {"WWW-Authenticate": self.challenge})
        if user != user_id:
            raise HTTPException(404, "Not found")
        await request.body()  # also where it is ignored: one that is too large is refused before anything is done
        return user


def plain_decimal(value: str) -> str:
    """int alone would also take +1, 01 and 1_0."""
    if not re.fullmatch("[1-9][0-9]*", value):
        raise ValueError
    return value


Id = Annotated[int, Field(ge=1, le=MAX_ID, json_schema_extra={"format": "int64"}), BeforeValidator(plain_decimal)]
Limit = Annotated[int, Field(ge=1, le=PAGE), BeforeValidator(plain_decimal)]
Absent = SkipJsonSchema[None]  # a query cannot say null


async def path_task_id(task_id: Id) -> int:
    return task_id


current_user = CurrentUser()
# The user who asks, and whose tasks these are: a route with this parameter is closed to all others.
UserId = Annotated[str, Depends(current_user)]
# A dependency too, because FastAPI documents a route's own parameters first, and user_id is not one.
TaskId = Annotated[int, Depends(path_task_id)]

# Statements are built once, because that costs more than running them. Each starts from the owner, who is
# not called user_id there: INSERT and UPDATE set each column that a parameter is named like.
tasks = Task.metadata.tables["task"]
public = [tasks.c[name] for name in TaskPublic.model_fields]
owned = tasks.c.user_id == bindparam("owner")
owned_task = and_(owned, tasks.c.id == bindparam("task_id"))
no_newer = tasks.c.id <= bindparam("newest")
any_or_one_status = tasks.c.status == func.coalesce(bindparam("status"), tasks.c.status)
now = func.clock_timestamp()  # now() would date an update that waited for another before it
completed_at = case((tasks.c.status == "complete", tasks.c.updated_at), else_=now)

LIST = select(*public).where(owned, no_newer, any_or_one_status).order_by(tasks.c.id.desc()).limit(bindparam("limit"))
CREATE = insert(tasks).returning(*public)
READ = select(*public).where(owned_task)
UPDATE = update(tasks).where(owned_task).values(updated_at=now).returning(*public)
DELETE = delete(tasks).where(owned_task).returning(*public)
COMPLETE = update(tasks).where(owned_task).values(status="complete", updated_at=completed_at).returning(*public)


async def one_task(statement: Executable, **values: Any) -> TaskPublic:
    """The task that the statement returns; 404 if it returns none: it is not there, or somebody else's."""
    found = await run(statement, **values)
    if not found:
        raise HTTPException(404, "Task not found")
    return TaskPublic.model_validate(found[0])


@app.get(TASKS, response_model=list[TaskPublic], responses={400: says(WRONG["status"]), 404: says("Not found")})
async def list_tasks(
    user: UserId, status: Status | Absent = None, limit: Limit | Absent = None, before: Id | Absent = None
) -> Response:
    """Newest first. With `limit`, they come in pages: `before` is the last id of the page before."""
    asked = {"owner": user, "status": status, "newest": before - 1 if before else MAX_ID}
    page = await run(LIST, **asked, limit=limit or PAGE + 1)
    if limit or len(page) <= PAGE:
        return Response(to_json(page), media_type="application/json")
    return StreamingResponse(stream(page, asked), media_type="application/json")


async def stream(page: list[dict[str, Any]], asked: dict[str, Any]) -> AsyncIterator[bytes]:
    """`page` and all tasks after it, each page read when the client has taken the one before."""
    text = b"[" + to_json(page[:PAGE])[1:-1]
    while len(page) > PAGE:
        last, page = page[PAGE - 1]["id"], []  # what waits for a client is one page, once
        for start in range(0, len(text), CHUNK):
            yield text[start : start + CHUNK]
        async with page_turn:
            page = await run(LIST, **asked | {"newest": last - 1}, limit=PAGE + 1)
        text = b"," + to_json(page[:PAGE])[1:-1] if page else b""
    yield text + b"]"


LOCATION = {"headers": {"Location": {"description": "The new task's address", "schema": {"type": "string"}}}}


@app.post(TASKS, status_code=201, responses={201: LOCATION, 400: says("Title is required"), 404: says("Not found")})
async def create_task(user: UserId, task: TaskCreate, response: Response) -> TaskPublic:
    """A new task is incomplete. The `Location` header is its address."""
    created = await one_task(CREATE, user_id=user, **task.model_dump())
    response.headers["Location"] = f"/api/{quote(user, safe='')}/tasks/{created.id}"
    return created


@app.get(TASK)
async def read_task(user: UserId, task_id: TaskId) -> TaskPublic:
    """One of your tasks."""
    return await one_task(READ, owner=user, task_id=task_id)


@app.put(TASK, responses={400: says("Send at least one of title, description, status")})
async def update_task(user: UserId, task_id: TaskId, changes: TaskUpdate) -> TaskPublic:
    """Changes what you send and leaves the rest; a `null` description clears it. The last write wins."""
    return await one_task(UPDATE, owner=user, task_id=task_id, **changes.model_dump())


@app.delete(TASK, status_code=204, response_class=Response)
async def delete_task(user: UserId, task_id: TaskId) -> None:
    """For good: afterwards the task is not found."""
    await one_task(DELETE, owner=user, task_id=task_id)


@app.patch(TASK + "/complete")
async def complete_task(user: UserId, task_id: TaskId) -> TaskPublic:
    """On a complete task this changes nothing, `updated_at` included. A body is ignored."""
    return await one_task(COMPLETE, owner=user, task_id=task_id)


@app.api_route("/health", methods=["GET", "HEAD"], include_in_schema=False)
async def health() -> dict[str, str]:
    """Asks the database nothing: a sleeping one would be kept awake, and its free hours spent."""
    return {"status": "ok"}


@app.get("/", include_in_schema=False)
async def home() -> RedirectResponse:
    return RedirectResponse("/docs")
