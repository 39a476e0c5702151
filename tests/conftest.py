from hypothesis import settings

# A first call may build caches; deadlines would make slow machines fail.
settings.register_profile("veerloss", deadline=None, max_examples=60, derandomize=True)
settings.load_profile("veerloss")
