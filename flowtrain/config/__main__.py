"""`python -m flowtrain.config` prints the JSON schema of a configuration."""

import json

from flowtrain.config.components import json_schema

print(json.dumps(json_schema(), indent=2))
