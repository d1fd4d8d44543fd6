"""The report of a study: a folder of static files to look at, opened from disk, without a network."""

from sae_ray.report.write import REPORT, write_report

__all__ = ["REPORT", "write_report"]
