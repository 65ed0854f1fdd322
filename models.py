"""What a task is: the rules of its fields, what clients send and see, what PostgreSQL stores."""

from datetime import datetime
from enum import StrEnum
from typing import Annotated, Self

import pydantic
from pydantic import MISSING, StringConstraints, model_validator
from pydantic_core import PydanticCustomError
from sqlalchemy import BigInteger, Identity, PrimaryKeyConstraint, String, func
from sqlmodel import Field, SQLModel

# Lengths count characters, that is Unicode code points, as PostgreSQL does.
USER_ID_LENGTH = 255
TITLE_LENGTH = 255
DESCRIPTION_LENGTH = 5000

# The largest bigint.
MAX_ID = 2**63 - 1

# PostgreSQL cannot store the character NUL.
NO_NUL = r"^[^\x00]*$"
# At least one character is not white space. A title is trimmed and has a min_length, but the
# OpenAPI document cannot say that it is trimmed.
NOT_BLANK = r"^[^\x00]*[^\s\x00][^\x00]*$"

# What a value may be. pydantic's Field describes a value. SQLModel's Field, further down, makes a
# column.
Title = Annotated[
    str,
    StringConstraints(
        strip_whitespace=True, min_length=1, max_length=TITLE_LENGTH, pattern=NOT_BLANK
    ),
    pydantic.Field(examples=["Buy groceries"]),
]
Description = Annotated[
    str,
    StringConstraints(max_length=DESCRIPTION_LENGTH, pattern=NO_NUL),
    pydantic.Field(examples=["Milk, eggs, bread"]),
]
TaskId = Annotated[
    int, pydantic.Field(ge=1, le=MAX_ID, examples=[1], json_schema_extra={"format": "int64"})
]


class Status(StrEnum):
    INCOMPLETE = "incomplete"
    COMPLETE = "complete"


# The length of the longest status.
STATUS_LENGTH = max(len(status) for status in Status)


class TaskCreate(SQLModel):
    """A new task. Other fields are ignored."""

    title: Title
    description: Description | None = None


class TaskUpdate(SQLModel):
    """What changes in a task: at least one of these. Other fields are ignored."""

    # Tells the OpenAPI document what changes_something() checks.
    model_config = {"json_schema_extra": {"minProperties": 1}}

    # MISSING is pydantic's marker of a field that was not sent: model_dump() leaves it out. None is
    # a null, which clears the description.
    title: Title | MISSING = MISSING
    description: Description | MISSING | None = MISSING
    status: Status | MISSING = MISSING

    @model_validator(mode="after")
    def changes_something(self) -> Self:
        if not self.model_fields_set:
            names = ", ".join(type(self).model_fields)
            # By "no_changes", what_is_wrong() in main.py knows that this is about no single field.
            # A ValueError's text would begin with "Value error, ".
            raise PydanticCustomError("no_changes", f"Send at least one of {names}")
        return self


class TaskPublic(SQLModel):
    """A task, as its owner sees it. Timestamps are in UTC."""

    # Each line is a field of the answers and, because Task inherits it, a column of the table.
    # SQLModel passes `schema_extra` on to pydantic's Field, as arguments.
    # `id` is no TaskId, because FastAPI rounds TaskId's maximum in a schema (not in a parameter) of
    # the OpenAPI document. Java that is generated from it would not compile.
    id: int = Field(
        sa_type=BigInteger,
        sa_column_args=[Identity(always=True)],
        schema_extra={"examples": [1], "json_schema_extra": {"format": "int64"}},
    )
    user_id: str = Field(max_length=USER_ID_LENGTH, schema_extra={"examples": ["alice"]})
    title: str = Field(max_length=TITLE_LENGTH, schema_extra={"examples": ["Buy groceries"]})
    description: str | None = Field(max_length=DESCRIPTION_LENGTH)
    # A VARCHAR. For a longer status, update_columns() in db.py lengthens it. An Enum would need an
    # ALTER TYPE by hand.
    status: Status = Field(
        sa_type=String(STATUS_LENGTH), sa_column_kwargs={"server_default": Status.INCOMPLETE.value}
    )
    # The column is a timestamptz (SQLModel's UTCDateTime).
    created_at: datetime = Field(sa_column_kwargs={"server_default": func.now()})
    # The updates in main.py set it.
    updated_at: datetime = Field(sa_column_kwargs={"server_default": func.now()})


class Task(TaskPublic, table=True):
    """The table. Its key begins with the owner, so that one index serves every query.

    It has no CHECKs: the rules stand above, once. A CHECK would need an ALTER TABLE for a change.
    """

    __table_args__ = (PrimaryKeyConstraint("user_id", "id"),)
