"""What the request log costs and how fast it is: `python -m benchmarks`, in files/litellm_sqlalchemy."""
