"""The configuration: its schema, options of data sets and models, YAML files, `KEY=VALUE`."""

from flowtrain.config.components import (
    all_keys,
    component,
    component_name,
    component_names,
    component_schema,
    json_schema,
    keys_like,
)
from flowtrain.config.files import differences, load_config, load_yaml, override, parse
from flowtrain.config.schema import Component, Config, Data, Dequantization, Model, Section, Train

__all__ = ["Component", "Config", "Data", "Dequantization", "Model", "Section", "Train"]
__all__ += ["all_keys", "component", "component_name", "component_names", "component_schema"]
__all__ += ["differences", "json_schema", "keys_like", "load_config", "load_yaml", "override"]
__all__ += ["parse"]
