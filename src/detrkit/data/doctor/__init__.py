"""The doctor: what is wrong with a data set, named, counted and shown file by file; and a clean copy of it.

`examine` looks through everything, `examine_briefly` is what every training begins with, `fixing.fix` writes the copy.
`kinds` is the table of what can be found. No image is changed, and nothing is guessed in silence: what only looks as if
it were wrong is told in these words.
"""

from detrkit.data.doctor.examine import examine, examine_briefly
from detrkit.data.doctor.findings import Diagnosis, Finding, Place, Resolution

__all__ = ["Diagnosis", "Finding", "Place", "Resolution", "examine", "examine_briefly"]
