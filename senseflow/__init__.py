"""SenseFlow: distils a text-to-image teacher into a generator of a few steps.

The run is `senseflow.train`; the operations for other projects are the package `senseflow_kernels`.
"""

__version__ = "0.1.0"
