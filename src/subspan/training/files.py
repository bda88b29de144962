"""Files that are written in one go, under the name that scripts for earlier versions import them by."""

from subspan.utils.atomic_files import write_text as write_text
from subspan.utils.atomic_files import written as written
