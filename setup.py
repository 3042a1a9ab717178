"""Adds the config files, which stand outside of the package, to a wheel as grpo_jax/configs."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithConfigs(build_py):
    """The command that collects the files of a wheel."""

    def run(self):
        """Collects the package and the config files; an editable install finds them in the checkout."""
        super().run()
        if not self.editable_mode:
            folder = Path(self.build_lib, "grpo_jax", "configs")
            self.mkpath(str(folder))
            for file in Path("configs").glob("*.py"):
                self.copy_file(str(file), str(folder / file.name))


setup(cmdclass={"build_py": BuildWithConfigs})
