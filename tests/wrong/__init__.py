"""What people give that is wrong, with what eke says about it; the page docs/troubleshooting.md is made of this "
"table."""

from __future__ import annotations

from . import budgets, commands, data, files, losses, models, settings
from .row import Command, Row

SECTIONS: dict[str, list[Row]] = {
    "The model": models.ROWS,
    "The data": data.ROWS,
    "Loss and score": losses.ROWS,
    "The budget": budgets.ROWS,
    "Other settings": settings.ROWS,
    "Folders and saved results": files.ROWS,
}
COMMANDS: list[Command] = commands.ROWS

__all__ = ["COMMANDS", "SECTIONS", "Command", "Row"]
