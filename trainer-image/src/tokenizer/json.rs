//! Values as Python writes them: `json.dumps`, which the filter `tojson` of `transformers` is, and `str`, by which Jinja prints.

use minijinja::value::{Kwargs, Value, ValueKind};
use minijinja::{Error, ErrorKind, Output, State};
use std::fmt::Write;

/// How `json.dumps` is to write.
struct Style {
    /// Blanks a level, or everything in one line.
    indent: Option<String>,
    item: String,
    key: String,
    ascii: bool,
    sorted: bool,
}

/// The filter `tojson`, with the parameters of `transformers`: `ensure_ascii`, `indent`, `separators` and `sort_keys`.
pub(super) fn tojson(value: Value, kwargs: Kwargs) -> Result<Value, Error> {
    let flag = |name| kwargs.get::<Option<bool>>(name).map(Option::unwrap_or_default);
    let indent = match kwargs.get::<Option<Value>>("indent")?.filter(|v| !v.is_none()) {
        None => None,
        Some(v) => match v.as_str() {
            Some(text) => Some(text.to_string()),
            None => Some(" ".repeat(usize::try_from(v).map_err(|_| invalid("tojson: indent is no number"))?)),
        },
    };
    let separators: Option<Vec<String>> = kwargs.get("separators")?;
    let [item, key] = match separators.as_deref() {
        Some([item, key]) => [item.clone(), key.clone()],
        Some(_) => return Err(invalid("tojson: separators are two")),
        None if indent.is_some() => [",".into(), ": ".into()],
        None => [", ".into(), ": ".into()],
    };
    let style = Style { indent, item, key, ascii: flag("ensure_ascii")?, sorted: flag("sort_keys")? };
    kwargs.assert_all_used()?;
    let mut out = String::new();
    dump(&value, &style, 0, &mut out)?;
    Ok(Value::from_safe_string(out))
}

fn invalid(what: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidOperation, what.into())
}

fn dump(value: &Value, style: &Style, depth: usize, out: &mut String) -> Result<(), Error> {
    match value.kind() {
        ValueKind::None => out.push_str("null"),
        ValueKind::Bool => out.push_str(if value.is_true() { "true" } else { "false" }),
        ValueKind::Number => out.push_str(&number(value)),
        ValueKind::String => quote(value.as_str().unwrap_or_default(), style.ascii, out),
        ValueKind::Map => {
            let mut keys: Vec<Value> = value.try_iter()?.collect();
            if style.sorted {
                keys.sort();
            }
            let entry = |key: &Value, out: &mut String| {
                quote(&key.to_string(), style.ascii, out);
                out.push_str(&style.key);
                dump(&value.get_item(key)?, style, depth + 1, out)
            };
            items("{}", &keys, style, depth, out, entry)?;
        }
        ValueKind::Seq | ValueKind::Iterable => {
            let all: Vec<Value> = value.try_iter()?.collect();
            items("[]", &all, style, depth, out, |item, out| dump(item, style, depth + 1, out))?;
        }
        other => return Err(invalid(format!("tojson: a value of type {other} is not JSON"))),
    }
    Ok(())
}

fn items(
    brackets: &str,
    all: &[Value],
    style: &Style,
    depth: usize,
    out: &mut String,
    mut write: impl FnMut(&Value, &mut String) -> Result<(), Error>,
) -> Result<(), Error> {
    let (open, close) = brackets.split_at(1);
    out.push_str(open);
    let line = |depth: usize, out: &mut String| {
        if let Some(indent) = style.indent.as_ref().filter(|_| !all.is_empty()) {
            out.push('\n');
            out.push_str(&indent.repeat(depth));
        }
    };
    for (i, item) in all.iter().enumerate() {
        if i > 0 {
            out.push_str(&style.item);
        }
        line(depth + 1, out);
        write(item, out)?;
    }
    line(depth, out);
    out.push_str(close);
    Ok(())
}

fn quote(text: &str, ascii: bool, out: &mut String) {
    out.push('"');
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\u{8}' => out.push_str("\\b"),
            '\u{c}' => out.push_str("\\f"),
            c if c < ' ' || (ascii && !c.is_ascii()) || (ascii && c == '\u{7f}') => {
                let mut units = [0; 2];
                for unit in c.encode_utf16(&mut units) {
                    let _ = write!(out, "\\u{unit:04x}");
                }
            }
            c => out.push(c),
        }
    }
    out.push('"');
}

/// A number by Python's `repr`: floats always with a point or an exponent, which begins above 1e16 and below 1e-4.
fn number(value: &Value) -> String {
    if value.is_integer() {
        return value.to_string();
    }
    let Ok(float) = f64::try_from(value.clone()) else { return value.to_string() };
    if !float.is_finite() {
        return if float.is_nan() { "NaN".into() } else { format!("{}Infinity", if float < 0.0 { "-" } else { "" }) };
    }
    let scientific = format!("{float:e}");
    let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let exponent: i32 = exponent.parse().unwrap_or_default();
    if float != 0.0 && !(-4..16).contains(&exponent) {
        return format!("{digits}e{}{:02}", if exponent < 0 { '-' } else { '+' }, exponent.abs());
    }
    let plain = format!("{float}");
    if plain.contains('.') { plain } else { format!("{plain}.0") }
}

/// Prints as Python's `str` does, where Jinja in Rust would print otherwise.
pub(super) fn print(out: &mut Output<'_>, _: &State<'_, '_>, value: &Value) -> Result<(), Error> {
    out.write_str(&string(value)?).map_err(Error::from)
}

/// The filter `string`: Python's `str`, by which Jinja prints and makes texts of what is none.
pub(super) fn string(value: &Value) -> Result<String, Error> {
    Ok(match value.kind() {
        ValueKind::Undefined => String::new(),
        ValueKind::String => value.as_str().unwrap_or_default().to_string(),
        _ => repr(value)?,
    })
}

/// The filter `trim`, of whatever prints.
pub(super) fn trim(value: &Value, characters: Option<String>) -> Result<String, Error> {
    let text = string(value)?;
    Ok(match characters {
        Some(characters) => text.trim_matches(|c| characters.contains(c)).to_string(),
        None => text.trim().to_string(),
    })
}

/// Python's `repr`.
fn repr(value: &Value) -> Result<String, Error> {
    let list = |values: Vec<Value>| values.iter().map(repr).collect::<Result<Vec<_>, _>>();
    Ok(match value.kind() {
        ValueKind::None => "None".into(),
        ValueKind::Bool => if value.is_true() { "True" } else { "False" }.into(),
        ValueKind::Number => number(value),
        ValueKind::String => repr_str(value.as_str().unwrap_or_default()),
        ValueKind::Map => {
            let keys: Vec<Value> = value.try_iter()?.collect();
            let entry = |key: &Value| Ok::<_, Error>(format!("{}: {}", repr(key)?, repr(&value.get_item(key)?)?));
            format!("{{{}}}", keys.iter().map(entry).collect::<Result<Vec<_>, _>>()?.join(", "))
        }
        ValueKind::Seq => format!("[{}]", list(value.try_iter()?.collect())?.join(", ")),
        _ => value.to_string(),
    })
}

fn repr_str(text: &str) -> String {
    let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    let mut out = String::from(quote);
    for c in text.chars() {
        match c {
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            c if c == quote => {
                out.push('\\');
                out.push(c);
            }
            c if c.is_control() => {
                let _ = write!(out, "\\x{:02x}", u32::from(c));
            }
            c => out.push(c),
        }
    }
    out.push(quote);
    out
}

#[cfg(test)]
mod tests {
    use minijinja::{Environment, context};

    fn rendered(template: &str, json: &str) -> String {
        let mut environment = Environment::new();
        environment.add_filter("tojson", super::tojson);
        environment.set_formatter(super::print);
        let x: minijinja::Value = serde_json::from_str(json).unwrap();
        environment.render_str(template, context! { x }).unwrap()
    }

    const X: &str =
        r#"{"b": [1, 2.0, 1e16, 0.00001, -0.5, null, true], "a": {"q": "é<&'\"\n\u007f", "e": {}, "l": []}}"#;

    /// Expected values: `json.dumps(x, ensure_ascii=False, ...)` of Python 3.11, which the filter of transformers 5.24 calls.
    #[test]
    fn tojson_writes_as_in_transformers() {
        assert_eq!(
            rendered("{{ x | tojson }}", X),
            "{\"b\": [1, 2.0, 1e+16, 1e-05, -0.5, null, true], \"a\": {\"q\": \"é<&'\\\"\\n\u{7f}\", \"e\": {}, \"l\": []}}"
        );
        assert_eq!(
            rendered("{{ x.a | tojson(indent=2, sort_keys=true) }}", X),
            "{\n  \"e\": {},\n  \"l\": [],\n  \"q\": \"é<&'\\\"\\n\u{7f}\"\n}"
        );
        assert_eq!(rendered("{{ x.b[:2] | tojson(separators=(',', ':')) }}", X), "[1,2.0]");
        assert_eq!(rendered("{{ 'é😀' | tojson(ensure_ascii=true) }}", X), r#""\u00e9\ud83d\ude00""#);
    }

    /// Expected values: `str(x)` of Python 3.11.
    #[test]
    fn values_print_as_in_python() {
        assert_eq!(
            rendered("{{ x.b }} {{ x.b[5] }} {{ x.b[6] }} {{ x.b[1] }} {{ x.nothing }}", X),
            "[1, 2.0, 1e+16, 1e-05, -0.5, None, True] None True 2.0 "
        );
        assert_eq!(rendered("{{ x }}", r#"{"k": "it's", "n": {"z": 1}}"#), r#"{'k': "it's", 'n': {'z': 1}}"#);
    }
}
