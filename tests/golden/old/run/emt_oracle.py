"""EMT as an oracle of one's own, beside the recipe; it counts, and kills the run that asks, if the environment says so."""

import os
import signal
import time
from pathlib import Path

from ase.calculators.emt import EMT

LOG = Path(__file__).with_name("asked")


class Oracle(EMT):
    """With EMT_KILLS_AT = n: the n-th answer takes two seconds, and comes after the process that asked for it was killed."""

    def calculate(self, *arguments, **named):
        super().calculate(*arguments, **named)
        kills_at = int(os.environ.get("EMT_KILLS_AT", -1))
        if kills_at >= 0:
            with open(LOG, "a") as file:
                file.write("x")
        if kills_at > 0 and LOG.stat().st_size == kills_at:
            time.sleep(2)
            os.kill(os.getppid(), signal.SIGKILL)
