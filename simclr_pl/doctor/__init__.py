"""The checks of `simclr doctor`: each returns lines to print, or plain measurements."""
