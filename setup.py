"""The optional compiled kernels; everything else about the package is in ``pyproject.toml``.

The kernels are one shared library with a C interface, loaded with ctypes: no Python or torch header is needed, and the
build succeeds without them where there is no C++ compiler.
"""

import logging
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

FOLDER = Path("postern/_native")

if sys.platform == "win32":
    compile_flags = ["/std:c++17", "/O2", "/fp:precise"]
    link_flags = []
else:
    # No fast-math and no contraction: the reduction of the argument relies on every rounding as it is written.
    compile_flags = ["-std=c++17", "-O3", "-ffp-contract=off", "-fvisibility=hidden", "-pthread"]
    link_flags = ["-pthread"]

kernels = Extension(
    "postern._native._kernels",
    sources=sorted(str(path) for path in FOLDER.glob("*.cpp")),
    depends=sorted(str(path) for path in FOLDER.glob("*.h")),
    extra_compile_args=compile_flags,
    extra_link_args=link_flags,
    language="c++",
    optional=True,
)


class BuildKernels(build_ext):
    """Builds a shared library that is no Python module, and says what it means where that fails."""

    def get_export_symbols(self, ext: Extension) -> list[str]:
        """Export what the sources mark as exported: there is no initialisation function."""
        return ext.export_symbols

    def build_extension(self, ext: Extension) -> None:
        """Build, or explain and go on without."""
        try:
            super().build_extension(ext)
        except Exception:
            logging.getLogger("postern").warning(
                "postern: the compiled kernels were NOT built (no working C++17 compiler). The installation goes on; "
                "postern will use the slower path through torch and say so."
            )
            raise


setup(ext_modules=[kernels], cmdclass={"build_ext": BuildKernels})
