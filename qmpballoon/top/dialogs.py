"""The dialogs: a new target, a new mode, the confirmation of both, and help."""

from __future__ import annotations

from typing import ClassVar, Final

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical, VerticalScroll
from textual.content import Content
from textual.screen import ModalScreen
from textual.widgets import Input, OptionList, Static

from qmpballoon.errors import InvalidSize, OutOfRange
from qmpballoon.model.records import MODES
from qmpballoon.model.tolerance import SAFE_MARGIN
from qmpballoon.top.rows import VmRow
from qmpballoon.units import format_size, parse_amount, round_up_to_page

_CSS: Final = """
{name} {{ align: center middle;
    & > #box {{ width: 72; max-width: 100%; height: auto; max-height: 100%; padding: 0 1;
        border: round $primary; background: $surface; }}
    .dim {{ color: $text-muted; }}
    .bad {{ color: $text-error; }}
    Input {{ margin: 1 0; }}
    OptionList, OptionList:focus {{ margin: 1 0; height: auto; border: none; }}
}}
"""
_MODES: Final = {
    "auto": "the policy moves it",
    "manual": "only targets that are set move it, and emergencies",
    "observe": "the policy decides and publishes, nothing moves it",
}

HELP: Final = """\
One line is one VM, below its host.

 bar         held, available and balloon, of the VM's size
 HELD        what the guest cannot give without reclaim or kills
 AVAIL       what it can still use, as it reports
 BALLOON     what it gave to the host
 HEALTH      ok; else what is wrong. WHY: the last decision's reason

 up down j k PgUp PgDn Home End     move
 Enter       one VM: its last ten minutes and its last decisions
 t           set a target        m    set a mode (both ask before)
 s  S        next, previous order      r    the other way round
 v           view: hosts with VMs, all VMs, hosts alone
 /           filter: words that name, host, health, reason or mode
             begin with or have in them; !ok: what is not ok
 Esc         no filter           d    dark or light
 ?           this help           q    quit
"""


class TargetDialog(ModalScreen[str | None]):
    """Asks for a target; the result is the size as typed, None when cancelled."""

    DEFAULT_CSS = _CSS.format(name="TargetDialog")
    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape", "dismiss(None)", "Cancel")]

    def __init__(self, row: VmRow) -> None:
        super().__init__()
        self._row = row

    def compose(self) -> ComposeResult:
        """Make the dialog."""
        row = self._row
        limits = f"floor {format_size(row.record.floor)}, ceiling {format_size(row.record.ceiling)}"
        now = f"now {format_size(row.actual)} of {format_size(row.size)}, holds {format_size(row.held)}"
        with Vertical(id="box"):
            yield Static(Content(f"New target of {row.host}/{row.name}"))
            yield Static(Content(f"{now}; {limits}"), classes="dim")
            yield Input(placeholder="256MiB, 1.5GiB, 50%", max_length=32)
            yield Static(Content(""), id="wrong", classes="bad")

    def on_input_submitted(self, event: Input.Submitted) -> None:
        """Return the size, or say why it is none."""
        typed = event.value.strip()
        try:
            target_of(typed, self._row)
        except (InvalidSize, OutOfRange) as error:
            self.query_one("#wrong", Static).update(Content(str(error)))
            return
        self.dismiss(typed)


def target_of(typed: str, row: VmRow) -> int:
    """Return the bytes of a typed target.

    Raises:
        InvalidSize: no size, or a percentage and the VM's size is not known.
        OutOfRange: zero, negative or too large.
    """
    return round_up_to_page(parse_amount(typed).of(row.size))


def target_question(typed: str, row: VmRow) -> tuple[str, str]:
    """Return what is asked before a target is sent, and a warning or an empty text."""
    target = target_of(typed, row)
    question = (
        f"Set the target of {row.host}/{row.name} from {format_size(row.actual)} to {format_size(target)}? "
        "Its mode is manual from then on."
    )
    if row.held is not None and row.actual is not None and target < min(row.actual, row.held + SAFE_MARGIN):
        return question, (
            f"The guest holds {format_size(row.held)}: below that plus {format_size(SAFE_MARGIN)} "
            "it reclaims, or kills processes."
        )
    return question, ""


class ModeDialog(ModalScreen[str | None]):
    """Asks for a mode; the result is its word, None when cancelled."""

    DEFAULT_CSS = _CSS.format(name="ModeDialog")
    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape", "dismiss(None)", "Cancel")]

    def __init__(self, row: VmRow) -> None:
        super().__init__()
        self._row = row

    def compose(self) -> ComposeResult:
        """Make the dialog."""
        with Vertical(id="box"):
            yield Static(Content(f"New mode of {self._row.host}/{self._row.name}, now {self._row.mode}"))
            yield OptionList(*(Content(f"{mode:8} {_MODES[mode]}") for mode in MODES), markup=False)

    def on_mount(self) -> None:
        """Begin at the present mode."""
        modes = self.query_one(OptionList)
        modes.highlighted = MODES.index(self._row.mode) if self._row.mode in MODES else 0

    def on_option_list_option_selected(self, event: OptionList.OptionSelected) -> None:
        """Return the mode."""
        self.dismiss(MODES[event.option_index])


class Confirmation(ModalScreen[bool]):
    """Asks a question; only ``y`` is yes."""

    DEFAULT_CSS = _CSS.format(name="Confirmation")
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("y", "dismiss(True)", "Yes"),
        Binding("n,escape,q", "dismiss(False)", "No"),
    ]

    def __init__(self, question: str, warning: str = "") -> None:
        super().__init__()
        self._question = question
        self._warning = warning

    def compose(self) -> ComposeResult:
        """Make the dialog."""
        with Vertical(id="box"):
            yield Static(Content(self._question))
            if self._warning:
                yield Static(Content(self._warning), classes="bad")
            yield Static(Content("\ny yes    n no"), classes="dim")


class Help(ModalScreen[None]):
    """The keys, and what the columns mean."""

    DEFAULT_CSS = _CSS.format(name="Help")
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,q,question_mark,enter", "dismiss(None)", "Close")
    ]

    def compose(self) -> ComposeResult:
        """Make the page."""
        with VerticalScroll(id="box"):
            yield Static(Content(HELP))
