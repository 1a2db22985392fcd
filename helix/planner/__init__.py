"""What a layout will cost before there are devices to run it on, and which one to choose.

No torch here: a command asks for `parallel=auto` before anything is imported, and a plan needs no machine.
"""
