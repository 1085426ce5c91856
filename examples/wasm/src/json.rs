//! JSON, as much as the reports need.

use crate::types::{ValType, Value};
use std::fmt::Write;

/// A JSON object being written.
#[derive(Default)]
pub struct Object {
    text: String,
}

impl Object {
    /// Adds a member whose value is JSON already.
    pub fn raw(mut self, name: &str, json: &str) -> Self {
        self.text.push_str(if self.text.is_empty() { "{" } else { "," });
        self.text.push_str(&string(name));
        self.text.push(':');
        self.text.push_str(json);
        self
    }

    /// Adds a number.
    pub fn number(self, name: &str, value: u64) -> Self {
        self.raw(name, &value.to_string())
    }

    /// Adds a string, or null.
    pub fn text(self, name: &str, value: Option<&str>) -> Self {
        self.raw(name, &value.map_or_else(|| "null".to_owned(), string))
    }

    /// Adds a list of values that are JSON already.
    pub fn list(self, name: &str, values: impl IntoIterator<Item = String>) -> Self {
        let list: Vec<_> = values.into_iter().collect();
        self.raw(name, &format!("[{}]", list.join(",")))
    }

    /// The object.
    pub fn finish(self) -> String {
        if self.text.is_empty() { "{}".to_owned() } else { self.text + "}" }
    }
}

/// A string, quoted.
pub fn string(text: &str) -> String {
    let mut out = String::from("\"");
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            c if (c as u32) < 0x20 => {
                let _ = write!(out, "\\u{:04x}", c as u32);
            }
            c => out.push(c),
        }
    }
    out.push('"');
    out
}

/// A WebAssembly value: a number where JSON has one for it.
pub fn value(value: &Value) -> String {
    let finite = match value.ty {
        ValType::I32 | ValType::I64 => true,
        ValType::F32 => f32::from_bits(value.bits as u32).is_finite(),
        ValType::F64 => f64::from_bits(value.bits).is_finite(),
        ValType::V128 | ValType::Ref { .. } => false,
    };
    if finite { value.to_string() } else { string(&value.to_string()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn objects_are_json() {
        let text = Object::default()
            .text("a\"b", Some("x\n\u{1}"))
            .text("none", None)
            .number("n", 7)
            .list("l", [value(&Value { ty: ValType::I32, bits: 0xffff_ffff })])
            .finish();
        assert_eq!(text, r#"{"a\"b":"x\n\u0001","none":null,"n":7,"l":[-1]}"#);
        assert_eq!(value(&Value { ty: ValType::F64, bits: f64::NAN.to_bits() }), "\"NaN\"");
        assert_eq!(Object::default().finish(), "{}");
    }
}
