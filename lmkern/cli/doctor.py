"""`lmkern doctor`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lmkern.cli.options import parse
from lmkern.cli.show import columns


@dataclass(frozen=True, kw_only=True)
class Doctor:
    """Print what this machine can run: every op and backend with the reason for each gap, versions, hardware.

    example:
      lmkern doctor
    """

    def run(self) -> int:
        """Print the tables."""
        from lmkern.kernels import native
        from lmkern.kernels.backends import describe
        from lmkern.machine import hardware, versions
        from lmkern.memory import huge_pages

        rows = [("op", "backend", "here", "")]
        rows += [(row.op, row.backend, "yes" if row.usable else "no", row.reason) for row in describe()]
        print(columns(rows))
        compiled = {
            "huge pages": huge_pages(),
            "CPU modules": ", ".join(native.cpu_modules()) or "none compiled",
        }
        if not (native.cpu_unavailable() or native.refusal()):
            compiled["CPU module used"] = native.instruction_set() + (
                " (LMKERN_CPU_ISA)" if native.forced() else ""
            )
        for name, error in native.import_errors().items():
            compiled[f"CPU module {name}"] = f"cannot be loaded: {error}"
        for name, module in native.cpu_modules().items():
            compiled[f"workspaces, {name}"] = (
                f"{module.workspace_bytes() / 2**20:.1f} MiB of scratch memory kept"
            )
        for facts in (versions(), hardware() | compiled):
            print("\n" + columns(list(facts.items())))
        return 0

    def kept(self) -> str:
        """What an interruption leaves."""
        return "doctor writes no files"


def command(argv: Sequence[str]) -> Doctor:
    """The command line as a Doctor."""
    return parse(Doctor, "doctor", argv)
