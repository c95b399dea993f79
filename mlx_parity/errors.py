"""What the kit raises. Every message names what was wrong and what to do about it."""

from __future__ import annotations


class ParityError(Exception):
    """Base of all the kit's own errors."""


class CarryError(ParityError):
    """The weights of one side cannot be carried to the other without guessing."""


class NotFiniteError(ParityError):
    """A weight or an input is NaN or infinite, so nothing computed from it can be compared."""


class EmptyBatchError(ParityError):
    """An input has no elements, for instance a batch of 0."""


class NotProven(ParityError, AssertionError):
    """A rung failed. The message names the tensor, its figures, the shape, and how to repeat it."""


class CannotCompile(ParityError):
    """MLX does not compile on this machine; on Linux it needs g++ at run time."""


class TF32Error(ParityError):
    """Numbers are to be compared where MLX may round products to 10 bits."""


LINES = 4
"""Of another's message: where a function has several signatures, the first says nothing yet."""


class SideError(ParityError):
    """One side raised an error of its own. ``side`` is whose fault it is."""

    def __init__(self, side: str, doing: str, error: BaseException):
        self.side, self.doing, self.error = side, doing, error
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        said = " ".join(lines[:LINES])
        what = f"{type(error).__name__}: {said}" if said else type(error).__name__
        super().__init__(f"the {side} raises {what} {doing}")

    @classmethod
    def about(cls, side: str, said: str) -> SideError:
        """What a side does without raising it."""
        made = cls(side, "", ValueError(said))
        made.args = (said,)
        return made


class NoGradient(SideError):
    """One side computes its loss and cannot be differentiated."""
