"""The report of a study: a folder of static web pages. It opens from disk and needs no network."""

from typing import TYPE_CHECKING

from sae_ray.lazy import exports

if TYPE_CHECKING:
    from sae_ray.report.results import Results as Results
    from sae_ray.report.results import open_study as open_study
    from sae_ray.report.write import REPORT as REPORT
    from sae_ray.report.write import write_report as write_report

__getattr__ = exports(
    __name__,
    {
        "results": ["Results", "open_study"],
        "write": ["REPORT", "write_report"],
    },
)
