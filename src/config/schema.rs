//! The JSON Schema of a configuration: completion, docs and errors in editors.
//!
//! It is derived from the types. Filters, whose types are registered at run time, and `${…}` are added afterwards.

use schemars::generate::SchemaSettings;
use serde_json::{Map, Value, json};

use super::Config;
use super::filter::{FilterEntry, FilterKind};

/// The text with a first line that tells editors where the schema is.
pub fn with_schema(text: &str) -> String {
    format!("# yaml-language-server: $schema=forebay.schema.json\n{text}")
}

/// The JSON Schema (draft 2020-12) of a configuration with these filters.
pub fn schema(kinds: &[FilterKind]) -> Value {
    let mut generator = SchemaSettings::draft2020_12().into_generator();
    let filters: Vec<Value> = kinds
        .iter()
        .map(|kind| {
            let settings = (kind.schema)(&mut generator);
            let when = json!({ "type": "string", "description": "A condition in CEL under which the filter acts." });
            json!({
                "type": "object",
                "properties": { kind.key: settings, FilterEntry::WHEN: when },
                "required": [kind.key],
                "additionalProperties": false,
            })
        })
        .collect();
    let mut schema = generator.into_root_schema_for::<Config>().to_value();
    allow_interpolation(&mut schema);
    let mut filters = json!({ "description": "A filter: its name and its settings.", "oneOf": filters });
    for filter in filters["oneOf"].as_array_mut().into_iter().flatten() {
        allow_interpolation(filter);
    }
    schema["title"] = "Forebay".into();
    // A file may be only a part of a configuration, so no top-level key is required.
    schema.as_object_mut().map(|whole| whole.remove("required"));
    schema["$defs"]["Filter"] = filters;
    describe_choices(&mut schema);
    schema["$defs"]["Interpolated"] = json!({
        "description": "`${VAR}`, `${VAR:-default}`, `${VAR:?why}` or `${file:/path}`",
        "type": "string",
        "pattern": r"\$\{",
    });
    schema
}

/// Copies the description of a choice to its key, where editors look for it.
fn describe_choices(schema: &mut Value) {
    match schema {
        Value::Array(schemas) => schemas.iter_mut().for_each(describe_choices),
        Value::Object(node) => {
            let said = node.get("description").cloned();
            let keys = node.get_mut("properties").and_then(Value::as_object_mut).filter(|keys| keys.len() == 1);
            for key in keys.into_iter().flat_map(|keys| keys.values_mut()).filter_map(Value::as_object_mut) {
                if let Some(said) = &said {
                    key.entry("description").or_insert_with(|| said.clone());
                }
            }
            node.values_mut().for_each(describe_choices);
        }
        _ => {}
    }
}

/// Allows `${…}` wherever a number, a boolean or a choice is expected. Text allows it already.
fn allow_interpolation(schema: &mut Value) {
    match schema {
        Value::Array(schemas) => schemas.iter_mut().for_each(allow_interpolation),
        Value::Object(node) => allow_in_object(node),
        _ => {}
    }
}

fn allow_in_object(node: &mut Map<String, Value>) {
    // `oneOf` would reject a text that matches two alternatives.
    if let Some(alternatives) = node.remove("oneOf") {
        node.insert("anyOf".to_owned(), alternatives);
    }
    if let Some(Value::Array(alternatives)) = node.get_mut("anyOf") {
        if alternatives.iter().any(is_restricted) {
            alternatives.push(interpolated());
        }
        let larger = alternatives.iter_mut().filter(|alternative| !is_restricted(alternative));
        larger.for_each(allow_interpolation);
    }
    if node.contains_key("anyOf") || node.get("type").is_some_and(|kind| kind == "null") {
        return;
    }
    if is_restricted(&Value::Object(node.clone())) {
        let outer = ["description", "default", "title", "examples"];
        let (outer, inner): (Map<_, _>, Map<_, _>) =
            std::mem::take(node).into_iter().partition(|(key, _)| outer.contains(&key.as_str()));
        *node = outer;
        node.insert("anyOf".to_owned(), json!([inner, interpolated()]));
        return;
    }
    for (key, inner) in node.iter_mut() {
        match (key.as_str(), inner) {
            ("properties" | "$defs" | "patternProperties", Value::Object(named)) => {
                named.values_mut().for_each(allow_interpolation);
            }
            ("items" | "additionalProperties" | "allOf", inner) => allow_interpolation(inner),
            _ => {}
        }
    }
}

fn interpolated() -> Value {
    json!({ "$ref": "#/$defs/Interpolated" })
}

/// Whether a schema is for scalars and would reject `${…}`.
fn is_restricted(schema: &Value) -> bool {
    let scalar = |kind: &Value| ["integer", "number", "boolean"].iter().any(|scalar| kind == scalar);
    match schema.get("type") {
        _ if schema.get("const").is_some() || schema.get("enum").is_some() => true,
        Some(Value::Array(kinds)) => kinds.iter().all(|kind| scalar(kind) || kind == "null"),
        Some(kind) => scalar(kind),
        None => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn allowed(mut schema: Value) -> Value {
        allow_interpolation(&mut schema);
        schema
    }

    #[test]
    fn numbers_and_choices_may_come_from_variables() {
        assert_eq!(
            allowed(json!({ "type": "integer", "minimum": 1, "default": 2 })),
            json!({ "default": 2, "anyOf": [{ "type": "integer", "minimum": 1 }, interpolated()] })
        );
        assert_eq!(
            allowed(json!({ "oneOf": [{ "const": "a" }, { "const": "b" }] })),
            json!({ "anyOf": [{ "const": "a" }, { "const": "b" }, interpolated()] })
        );
    }

    #[test]
    fn text_is_left_alone_and_maps_are_entered() {
        let schema = json!({ "type": "object", "properties": { "name": { "type": "string" } } });
        assert_eq!(allowed(schema.clone()), schema);
        let schema = json!({ "type": "object", "properties": { "on": { "type": "boolean" } } });
        assert_eq!(allowed(schema)["properties"]["on"], json!({ "anyOf": [{ "type": "boolean" }, interpolated()] }));
    }
}
