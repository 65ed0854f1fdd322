"""What a task is: the rules of its fields, what clients send and see, what PostgreSQL stores, what breaks a rule."""

from collections.abc import Mapping
from datetime import datetime
from enum import StrEnum
from typing import Annotated, Any, Self

from pydantic import MISSING, StringConstraints, model_validator
from pydantic_core import PydanticCustomError
from sqlmodel import BigInteger, CheckConstraint, Field, Identity, PrimaryKeyConstraint, SQLModel, String, func

# Lengths are in characters, that is Unicode code points, as PostgreSQL counts them.
USER_ID_LENGTH = 255
MAX_ID = 2**63 - 1

# PostgreSQL cannot store NUL. The title's pattern also tells clients that a blank one is refused.
Title = Annotated[
    str,
    StringConstraints(strip_whitespace=True, min_length=1, max_length=255, pattern=r"^[^\x00]*[^\s\x00][^\x00]*$"),
    Field(schema_extra={"examples": ["Buy groceries"]}),
]
Description = Annotated[
    str,
    StringConstraints(max_length=5000, pattern=r"^[^\x00]*$"),
    Field(schema_extra={"examples": ["Milk, eggs, bread"]}),
]


class Status(StrEnum):
    INCOMPLETE = "incomplete"
    COMPLETE = "complete"


class TaskCreate(SQLModel):
    """A new task. Other fields are ignored."""

    title: Title
    description: Description | None = None


class TaskUpdate(SQLModel):
    """What changes in a task: at least one of these. Other fields are ignored."""

    model_config = {"json_schema_extra": {"minProperties": 1}}

    # MISSING, which model_dump leaves out, where null is a value.
    title: Title | MISSING = MISSING
    description: Description | MISSING | None = MISSING
    status: Status | MISSING = MISSING

    @model_validator(mode="after")
    def changes_something(self) -> Self:
        if not self.model_fields_set:
            raise PydanticCustomError("no_changes", "Send at least one of " + ", ".join(type(self).model_fields))
        return self


class TaskPublic(SQLModel):
    """A task, as its owner sees it. Timestamps are in UTC."""

    id: int = Field(
        sa_type=BigInteger,
        sa_column_args=[Identity(always=True)],
        schema_extra={"json_schema_extra": {"format": "int64"}, "examples": [1]},
    )
    user_id: str = Field(max_length=USER_ID_LENGTH, schema_extra={"examples": ["alice"]})
    title: str = Field(max_length=255, schema_extra={"examples": ["Buy groceries"]})
    description: str | None = Field(max_length=5000, schema_extra={"examples": ["Milk, eggs, bread"]})
    status: Status = Field(sa_type=String(10), sa_column_kwargs={"server_default": "incomplete"})
    created_at: datetime = Field(sa_column_kwargs={"server_default": func.now()})
    updated_at: datetime = Field(sa_column_kwargs={"server_default": func.now()})


class Task(TaskPublic, table=True):
    """The table. Its key leads with the owner, so that one index serves every query."""

    __table_args__ = (
        PrimaryKeyConstraint("user_id", "id"),
        CheckConstraint("title <> ''"),
        CheckConstraint("status IN ('incomplete', 'complete')"),
    )


class Error(SQLModel):
    """What is wrong, in one sentence, or several joined with "; "."""

    error: str


# What is said of a field, or else of the rule that it breaks.
WRONG = {
    "task_id": "Task id must be a positive integer",
    "before": "Before must be a positive integer",
    "limit": "Limit must be an integer from 1 to 100",
    "status": "Status must be 'incomplete' or 'complete'",
}
BROKEN = {
    "string_type": "{} must be a string",
    "string_too_short": "{} cannot be empty",
    "string_too_long": "{} must be {max_length} characters or less",
    "string_pattern_mismatch": "{} must not contain NUL characters",
    "string_unicode": "{} must not contain lone surrogates",
}


def sentence(error: Mapping[str, Any], method: str) -> str:
    """Says what is wrong, and never what was sent. Where no sentence of ours does, pydantic's does."""
    where, rule, message, sent = error["loc"], error["type"], error["msg"], error["input"]
    if rule == "json_invalid":
        return "Body must be valid JSON"
    if where == ("body",):
        if isinstance(sent, bytes):  # as FastAPI leaves what is not declared as JSON
            return "Content-Type must be application/json"
        return "Body must be a JSON object" if rule in ("missing", "model_attributes_type") else message
    field = str(where[1])
    if field == "title" and (sent is None or rule in ("missing", "string_too_short")):
        return "Title is required" if method == "POST" else "Title cannot be empty"
    template = WRONG.get(field) or BROKEN.get(rule, "{}: {msg}")
    return template.format(field.replace("_", " ").capitalize(), **error.get("ctx", {}) | {"msg": message})
