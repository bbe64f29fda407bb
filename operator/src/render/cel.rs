//! Evaluates admission policies as the API server does, for tests: match conditions, variables and
//! validations of one policy against one request.

use std::collections::HashMap;
use std::sync::Arc;

use kube_cel::KubeCelExt;
use kube_cel::cel::objects::{Key, Map};
use kube_cel::cel::{Context, ExecutionError, Program, Value as Cel};
use serde_json::{Value, json};

/// A request as policies see it.
pub(crate) struct Request<'a> {
    /// `CREATE`, `UPDATE` or `DELETE`.
    pub(crate) operation: &'a str,
    /// `userInfo`.
    pub(crate) user: Value,
    pub(crate) before: Option<&'a Value>,
    pub(crate) after: Option<&'a Value>,
}

/// Returns the message with which the policy of that spec refuses the request.
pub(crate) fn refusal(spec: &Value, request: &Request<'_>) -> Option<String> {
    let mut context = Context::default().with_all();
    context.add_function("dyn", |value: Cel| -> Result<Cel, ExecutionError> {
        Ok(value)
    });
    let mut set = |name: &str, value: &Value| context.add_variable_from_value(name, cel(value));
    set("object", request.after.unwrap_or(&Value::Null));
    set("oldObject", request.before.unwrap_or(&Value::Null));
    set(
        "request",
        &json!({"operation": request.operation, "userInfo": request.user}),
    );
    let list = |field: &str| spec[field].as_array().cloned().unwrap_or_default();
    for condition in list("matchConditions") {
        if run(&context, &condition["expression"]) != Ok(Cel::Bool(true)) {
            return None;
        }
    }
    let mut variables = HashMap::new();
    for variable in list("variables") {
        // A variable that fails is an error only where it is used.
        if let Ok(value) = run(&context, &variable["expression"]) {
            variables.insert(key(variable["name"].as_str().unwrap_or_default()), value);
            let known = Map {
                map: Arc::new(variables.clone()),
            };
            context.add_variable_from_value("variables", Cel::Map(known));
        }
    }
    list("validations")
        .iter()
        .find_map(|rule| match run(&context, &rule["expression"]) {
            Ok(Cel::Bool(true)) => None,
            Ok(_) => Some(rule["message"].as_str().unwrap_or_default().to_owned()),
            Err(error) => Some(format!("{error}: {rule}")),
        })
}

fn run(context: &Context<'_>, expression: &Value) -> Result<Cel, String> {
    let text = expression.as_str().unwrap_or_default();
    let program = Program::compile(text).map_err(|error| format!("{error}: {text}"))?;
    program.execute(context).map_err(|error| error.to_string())
}

fn key(text: &str) -> Key {
    Key::String(Arc::new(text.to_owned()))
}

fn cel(value: &Value) -> Cel {
    match value {
        Value::Null => Cel::Null,
        Value::Bool(truth) => Cel::Bool(*truth),
        Value::Number(number) => number
            .as_i64()
            .map_or(Cel::Float(number.as_f64().unwrap_or_default()), Cel::Int),
        Value::String(text) => Cel::String(Arc::new(text.clone())),
        Value::Array(items) => Cel::List(Arc::new(items.iter().map(cel).collect())),
        Value::Object(fields) => Cel::Map(Map {
            map: Arc::new(
                fields
                    .iter()
                    .map(|(name, value)| (key(name), cel(value)))
                    .collect(),
            ),
        }),
    }
}
