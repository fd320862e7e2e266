"""Many adapters behind one base, with OpenAI's API.

`engine.py` is what an inference engine has to do; `registry.py` finds adapters; `app.py` speaks HTTP.
"""
