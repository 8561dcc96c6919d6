"""Keys that the test gateway knows."""

MASTER_KEY = "sk-test-master-0123456789"
#: Sent by the gateway to the provider.
PROVIDER_KEY = "sk-test-provider-key"
USER_KEY, LIMITED_KEY, POOR_KEY = "sk-test-user", "sk-test-limited", "sk-test-poor"
#: LiteLLM hashes only keys that begin with `sk-`.
OPAQUE_KEY = "opaque-test-key"
