"""The laws of parts, for the tests of an extension: `check_extension` (`docs/extend.md`)."""

from sat_train.testing.law_table import LAWS as LAWS
from sat_train.testing.law_table import BrokenLaws as BrokenLaws
from sat_train.testing.law_table import LawReport as LawReport
from sat_train.testing.law_table import LawResult as LawResult
from sat_train.testing.law_table import check_extension as check_extension
from sat_train.testing.pool import RankPool as RankPool
