"""What a task is: the rules of its fields, what clients send and see, and what PostgreSQL stores."""

from datetime import datetime
from enum import StrEnum
from typing import Annotated, Self

from pydantic import MISSING, StringConstraints, model_validator
from pydantic_core import PydanticCustomError
from sqlmodel import BigInteger, CheckConstraint, Field, Identity, PrimaryKeyConstraint, SQLModel, String, func

# Lengths are in characters, that is Unicode code points, as PostgreSQL counts them.
USER_ID_LENGTH = 255
TITLE_LENGTH = 255
DESCRIPTION_LENGTH = 5000
MAX_ID = 2**63 - 1

# PostgreSQL cannot store NUL. The title's pattern also tells clients that a blank one is refused.
Title = Annotated[
    str,
    StringConstraints(
        strip_whitespace=True, min_length=1, max_length=TITLE_LENGTH, pattern=r"^[^\x00]*[^\s\x00][^\x00]*$"
    ),
    Field(schema_extra={"examples": ["Buy groceries"]}),
]
Description = Annotated[
    str,
    StringConstraints(max_length=DESCRIPTION_LENGTH, pattern=r"^[^\x00]*$"),
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

    # MISSING is what was not sent, and model_dump leaves it out.
    title: Title | MISSING = MISSING
    description: Description | MISSING | None = MISSING
    status: Status | MISSING = MISSING

    @model_validator(mode="after")
    def changes_something(self) -> Self:
        if not self.model_fields_set:
            raise PydanticCustomError("no_changes", "Send at least one of " + ", ".join(type(self).model_fields))
        return self


class TaskPublic(SQLModel):
    """A task, as its owner sees it. Timestamps are in UTC."""  # never validated: what is stored is shown

    id: int = Field(
        sa_type=BigInteger,
        sa_column_args=[Identity(always=True)],
        schema_extra={"json_schema_extra": {"format": "int64"}, "examples": [1]},
    )
    user_id: str = Field(max_length=USER_ID_LENGTH, schema_extra={"examples": ["alice"]})
    title: str = Field(max_length=TITLE_LENGTH, schema_extra={"examples": ["Buy groceries"]})
    description: str | None = Field(max_length=DESCRIPTION_LENGTH, schema_extra={"examples": ["Milk, eggs, bread"]})
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
