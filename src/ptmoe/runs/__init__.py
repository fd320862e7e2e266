"""The run folder: its layout and typed records, shared by the code that writes runs and the code that reads them."""
