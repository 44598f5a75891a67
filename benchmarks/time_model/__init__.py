"""A model of time: how long kernels would take on a GPU, from their compiled code and their shapes.

rates.py holds what is assumed of the hardware, work.py what one launch has to do and how long that
takes, network.py which ops a network runs, cuda_launches.py (over cuda_backend.py) and
triton_launches.py how those become launches of our kernels, plot.py and report.py what people see.
`benchmarks/predict.py` is the command. Nothing is measured here.
"""
