//! The five kinds of values, as text.

/// A kind of value.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Kind(pub &'static str);

/// All of them.
pub const KINDS: [Kind; 5] = [Kind("i32"), Kind("i64"), Kind("f32"), Kind("f64"), Kind("v128")];

impl Kind {
    /// The value that stands for the 32-bit integer that `text` computes. Exact for all below 2^24.
    pub fn of(self, text: &str) -> String {
        match self.0 {
            "i32" => text.to_owned(),
            "i64" => format!("(i64.extend_i32_s {text})"),
            "v128" => format!("(i32x4.splat {text})"),
            float => format!("({float}.convert_i32_s {text})"),
        }
    }

    /// The value that stands for `number`.
    pub fn number(self, number: i32) -> String {
        match self.0 {
            "v128" => format!("(v128.const i32x4 {number} {number} {number} {number})"),
            name => format!("({name}.const {number})"),
        }
    }

    fn name(self) -> &'static str {
        if self.0 == "v128" { "i32x4" } else { self.0 }
    }

    /// The sum of two.
    pub fn sum(self, a: &str, b: &str) -> String {
        format!("({}.add {a} {b})", self.name())
    }

    /// The difference of two.
    pub fn difference(self, a: &str, b: &str) -> String {
        format!("({}.sub {a} {b})", self.name())
    }

    /// Whether two differ in any bit.
    pub fn differ(self, a: &str, b: &str) -> String {
        match self.0 {
            "v128" => format!("(v128.any_true (v128.xor {a} {b}))"),
            name => format!("({name}.ne {a} {b})"),
        }
    }
}

/// `count` values of each of `kinds`, one kind after the other in turn.
pub fn in_turn(kinds: &[Kind], count: usize) -> Vec<Kind> {
    kinds.iter().copied().cycle().take(kinds.len() * count).collect()
}

/// Their types.
pub fn types(kinds: &[Kind]) -> String {
    kinds.iter().map(|kind| kind.0).collect::<Vec<_>>().join(" ")
}
