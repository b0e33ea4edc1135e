//! The interpreter of the `cel` crate as a second opinion. The fuzz target `rules` includes this file as well.

use std::collections::HashMap;
use std::sync::Arc;

use http::HeaderMap;

/// What the interpreter makes of an expression, for a request with this method, path and headers. Each header has one
/// value, which is ASCII.
///
/// # Errors
/// What the interpreter reports: it does not know a name or a function, or fails as it runs.
pub fn interpreted(written: &str, method: &str, path: &str, headers: &HeaderMap) -> Result<cel::Value, String> {
    let mut env = cel::Env::stdlib();
    env.add_extension(cel::extensions::strings).map_err(|error| error.to_string())?;
    let program = env.compile(written).map_err(|error| error.to_string())?;
    let headers: HashMap<String, cel::Value> = headers
        .iter()
        .map(|(name, value)| (name.to_string(), cel::Value::from(value.to_str().unwrap_or_default())))
        .collect();
    let request: HashMap<String, cel::Value> = HashMap::from([
        ("method".to_owned(), method.into()),
        ("path".to_owned(), path.into()),
        ("headers".to_owned(), headers.into()),
    ]);
    let mut context = cel::Context::with_env(Arc::new(env));
    context.add_variable_from_value("request", request);
    program.execute(&context).map_err(|error| error.to_string())
}
