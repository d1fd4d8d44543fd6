"""Puts the one-line `.pth` beside the module, which a declarative configuration cannot say."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithPth(build_py):
    def run(self):
        super().run()
        target = Path(self.build_lib)
        target.mkdir(parents=True, exist_ok=True)
        (target / "sae_ray_cpu_wheels.pth").write_text("import sae_ray_cpu_wheels\n")


setup(cmdclass={"build_py": BuildWithPth})
