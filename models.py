"""What a task is: the rules of its fields, what clients send and see, what PostgreSQL stores."""

from datetime import datetime
from typing import Annotated, Literal, Self

from pydantic import StringConstraints, model_validator
from pydantic_core import PydanticCustomError
from sqlmodel import BigInteger, CheckConstraint, Field, Identity, PrimaryKeyConstraint, SQLModel, func

# Lengths are in characters, that is Unicode code points, as PostgreSQL counts them.
TITLE_LENGTH = 255
DESCRIPTION_LENGTH = 5000
USER_ID_LENGTH = 255
MAX_ID = 2**63 - 1

# PostgreSQL cannot store NUL. The title's pattern also tells clients that a blank one is refused;
# \x85 is blank in Unicode, but not for JavaScript's \s.
Title = Annotated[
    str,
    StringConstraints(
        strip_whitespace=True, min_length=1, max_length=TITLE_LENGTH, pattern=r"^[^\x00]*[^\s\x00\x85][^\x00]*$"
    ),
]
Description = Annotated[str, StringConstraints(max_length=DESCRIPTION_LENGTH, pattern=r"^[^\x00]*$")]
Status = Literal["incomplete", "complete"]


class TaskCreate(SQLModel):
    """A new task. Other fields are ignored."""

    model_config = {"json_schema_extra": {"example": {"title": "Buy groceries", "description": "Milk, eggs, bread"}}}

    title: Title
    description: Description | None = None


class TaskUpdate(SQLModel):
    """What changes in a task: at least one of these. Other fields are ignored."""

    model_config = {
        "json_schema_extra": {
            "anyOf": [{"required": [field]} for field in ("title", "description", "status")],
            "example": {"title": "Buy groceries for two", "status": "complete"},
        }
    }

    # Only what was sent is read, never a default; one that is made keeps out of the OpenAPI document.
    title: Title = Field(default_factory=str)
    description: Description | None = Field(default_factory=str)
    status: Status = Field(default_factory=str)

    @model_validator(mode="after")
    def changes_something(self) -> Self:
        if not self.model_fields_set:
            raise PydanticCustomError("no_changes", "Send a title, a description or a status")
        return self


class TaskPublic(SQLModel):
    """A task, as its owner sees it. Timestamps are in UTC."""

    model_config = {
        "json_schema_extra": {
            "example": {
                "id": 1,
                "user_id": "alice",
                "title": "Buy groceries",
                "description": "Milk, eggs, bread",
                "status": "incomplete",
                "created_at": "2026-01-31T08:30:00.123456Z",
                "updated_at": "2026-01-31T08:30:00.123456Z",
            }
        }
    }

    id: int
    user_id: str = Field(max_length=USER_ID_LENGTH)
    title: str = Field(max_length=TITLE_LENGTH)
    description: str | None = Field(max_length=DESCRIPTION_LENGTH)
    status: Status
    created_at: datetime
    updated_at: datetime


class Task(SQLModel, table=True):
    """The table. Its key leads with the owner, so that one index serves every query."""

    __table_args__ = (
        PrimaryKeyConstraint("user_id", "id"),
        CheckConstraint("title <> ''"),
        CheckConstraint("status IN ('incomplete', 'complete')"),
    )

    id: int = Field(sa_type=BigInteger, sa_column_args=[Identity(always=True)])
    user_id: str = Field(max_length=USER_ID_LENGTH)
    title: str = Field(max_length=TITLE_LENGTH)
    description: str | None = Field(max_length=DESCRIPTION_LENGTH)
    status: str = Field(max_length=10, sa_column_kwargs={"server_default": "incomplete"})
    created_at: datetime = Field(sa_column_kwargs={"server_default": func.now()})
    updated_at: datetime = Field(sa_column_kwargs={"server_default": func.now()})


class Error(SQLModel):
    """What is wrong, in one sentence, or several joined with "; "."""

    error: str
