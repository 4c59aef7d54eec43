"""The long replay: a day and more of a large water network, a reading a minute, through contract, state and table.

The network is wntr's Net6 (3,356 nodes). Its pressures are simulated, and so are noise, leaks and faults of sensors.
"""
