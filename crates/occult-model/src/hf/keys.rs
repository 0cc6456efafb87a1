//! Typed look-ups in config.json, with bounds: a number read here sizes tables later.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::checkpoint::read_json;
use crate::error::{ModelError, Result};

/// Largest sensible width or count in a configuration.
pub(crate) const MAX_SIZE: usize = 1 << 24;
/// Most layers.
pub(crate) const MAX_LAYERS: usize = 1024;
/// Most routed experts of a layer.
pub(crate) const MAX_EXPERTS: usize = 4096;
/// Most experts of all layers together: bounds the list of tensor names.
pub(crate) const MAX_LAYER_EXPERTS: usize = 1 << 18;

/// One JSON object and the file it comes from.
#[derive(Debug)]
pub(crate) struct Keys {
    file: PathBuf,
    /// Put before key names in messages.
    prefix: String,
    map: Map<String, Value>,
}

impl Keys {
    pub(crate) fn read(path: &Path) -> Result<Self> {
        Ok(Self { file: path.to_path_buf(), prefix: String::new(), map: read_json(path)? })
    }

    /// A value that is there and not null.
    pub(crate) fn get(&self, key: &str) -> Option<&Value> {
        self.map.get(key).filter(|v| !v.is_null())
    }

    pub(crate) fn bad(&self, key: &str, message: impl Into<String>) -> ModelError {
        ModelError::bad(&self.file, format!("{}{key}", self.prefix), message)
    }

    pub(crate) fn unsupported(&self, key: &str, found: impl ToString, supported: &str) -> ModelError {
        ModelError::Unsupported {
            file: self.file.clone(),
            option: format!("{}{key}", self.prefix),
            found: found.to_string(),
            supported: supported.to_owned(),
        }
    }

    fn wrong(&self, key: &str, value: &Value, expected: &str) -> ModelError {
        self.bad(key, format!("is {value}, expected {expected}"))
    }

    pub(crate) fn usize_opt(&self, key: &str, min: usize, max: usize) -> Result<Option<usize>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match value.as_u64() {
            Some(n) if (min as u64..=max as u64).contains(&n) => Ok(Some(n as usize)),
            _ => Err(self.wrong(key, value, &format!("a whole number from {min} to {max}"))),
        }
    }

    pub(crate) fn usize(&self, key: &str, max: usize) -> Result<usize> {
        self.usize_opt(key, 1, max)?.ok_or_else(|| self.bad(key, "is missing"))
    }

    pub(crate) fn f64_opt(&self, key: &str) -> Result<Option<f64>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match value.as_f64() {
            Some(x) if x.is_finite() => Ok(Some(x)),
            _ => Err(self.wrong(key, value, "a finite number")),
        }
    }

    /// A positive number.
    pub(crate) fn positive(&self, key: &str, default: Option<f64>) -> Result<f64> {
        match self.f64_opt(key)?.or(default) {
            Some(x) if x > 0.0 => Ok(x),
            Some(x) => Err(self.bad(key, format!("is {x}, expected a positive number"))),
            None => Err(self.bad(key, "is missing")),
        }
    }

    pub(crate) fn bool(&self, key: &str, default: bool) -> Result<bool> {
        match self.get(key) {
            None => Ok(default),
            Some(Value::Bool(b)) => Ok(*b),
            Some(value) => Err(self.wrong(key, value, "true or false")),
        }
    }

    pub(crate) fn str_opt(&self, key: &str) -> Result<Option<&str>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::String(s)) => Ok(Some(s)),
            Some(value) => Err(self.wrong(key, value, "a string")),
        }
    }

    /// A number or a list of numbers.
    pub(crate) fn ids(&self, key: &str) -> Result<Vec<u32>> {
        let one = |v: &Value| v.as_u64().and_then(|n| u32::try_from(n).ok());
        let Some(value) = self.get(key) else { return Ok(Vec::new()) };
        let ids = match value {
            Value::Array(list) => list.iter().map(one).collect(),
            other => one(other).map(|id| vec![id]),
        };
        ids.ok_or_else(|| self.wrong(key, value, "a whole number or a list of them"))
    }

    pub(crate) fn object(&self, key: &str) -> Result<Option<Keys>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Object(map)) => Ok(Some(Keys {
                file: self.file.clone(),
                prefix: format!("{}{key}.", self.prefix),
                map: map.clone(),
            })),
            Some(value) => Err(self.wrong(key, value, "an object")),
        }
    }

    /// Errors unless an option is absent or one of `allowed`.
    pub(crate) fn only(&self, key: &str, allowed: &[&str]) -> Result<()> {
        match self.str_opt(key)? {
            Some(found) if !allowed.contains(&found) => {
                Err(self.unsupported(key, found, &allowed.join(", ")))
            }
            _ => Ok(()),
        }
    }

    /// Errors unless a flag is absent or has this value.
    pub(crate) fn only_bool(&self, key: &str, allowed: bool) -> Result<()> {
        if self.bool(key, allowed)? != allowed {
            return Err(self.unsupported(key, !allowed, &allowed.to_string()));
        }
        Ok(())
    }
}
