"""Published sets as stacks: PASTIS and MTLCC, from their files as downloaded.

The order of imports: ``georeference`` and ``tfrecord`` know nothing of sets; ``plan`` says what
will be written; ``pastis`` and ``mtlcc`` look a set through and read its sites; ``run`` carries a
plan out, shard by shard, so that it can be stopped and run again.
"""

from .plan import Finding, ImportPlan, SeasonImport, SitePixels, SiteSource

__all__ = ["Finding", "ImportPlan", "SeasonImport", "SitePixels", "SiteSource"]
