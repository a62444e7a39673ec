"""How fast the model learns when, and for how long: by steps, or by minutes of this machine.

Knows steps and seconds; knows no weight. The rate rises, stays, and falls to zero. When it begins
to fall, the end is fixed: from then on the run is a matter of steps alone. Both are kept in the
state, so a resumed run goes on as it would have, and ``steps`` repeats a run on any machine.

    rate      ____________________
             /                    \\
            /                      \\___
    step   0  WARM              falls     ends
"""

import dataclasses
import math

WARM = 300
CONSTANT = 0.65  # of the run, at the peak
AGAIN = 0.4  # of the peak, where a run that was over goes on


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Attributes:
    minutes: of training, when steps do not decide.
    height: of the rate, where it begins to fall.
    falls, ends: steps at which the rate begins to fall, and at which the run ends; None: not
        known yet.
    """

    minutes: float
    falls: int | None = None
    ends: int | None = None
    height: float = 1.0

    @classmethod
    def of_steps(cls, steps: int) -> "Schedule":
        """A run of a known number of steps."""
        return cls(0.0, round(steps * CONSTANT), steps)

    def after(self, step: int, seconds: float, steps_per_second: float) -> "Schedule":
        """The schedule once ``step`` steps have taken ``seconds``, both of the whole run.

        steps_per_second: as of late; what is left of the minutes becomes so many steps.
        """
        if self.ends is not None or seconds < self.minutes * 60 * CONSTANT:
            return self
        left = max(1, round((self.minutes * 60 - seconds) * steps_per_second))
        return dataclasses.replace(self, falls=step, ends=step + left)

    def prolonged(self, seconds: float, minutes: float) -> "Schedule":
        """The schedule of a run that has taken ``seconds`` and shall go on for ``minutes``.

        Raises:
            ValueError: the rate has begun to fall, so that the end is fixed.
        """
        if self.falls is not None:
            raise ValueError(f"the run ends at step {self.ends}: resume it without minutes")
        return dataclasses.replace(self, minutes=seconds / 60 + minutes)

    def again(self, steps: int) -> "Schedule":
        """The schedule of a run that is over and goes on for ``steps``, from a lower rate.

        Raises:
            ValueError: it is not over.
        """
        if self.ends is None:
            raise ValueError("the run is not over: resume it without --again first")
        return Schedule(self.minutes, self.ends, self.ends + steps, AGAIN)

    def rate(self, step: int) -> float:
        """Of the peak, at a step counted from 0."""
        warm = min(1.0, (step + 1) / WARM)
        if self.falls is None or self.ends is None or step < self.falls:
            return warm
        share = (step - self.falls) / (self.ends - self.falls)
        return self.height * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, share))))

    def is_over(self, step: int) -> bool:
        """Whether ``step`` steps are all."""
        return self.ends is not None and step >= self.ends

    def seconds_left(self, step: int, seconds: float, steps_per_second: float) -> float:
        """About how long the rest takes; arguments as in `after`."""
        if self.ends is None:
            return self.minutes * 60 - seconds
        return (self.ends - step) / steps_per_second
