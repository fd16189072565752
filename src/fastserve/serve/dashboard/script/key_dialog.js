// Takes the visitor's keys, and tries an admin key before it is kept.

import { keepKey, keyOf } from "./credential.js";
import { byId } from "./dom.js";
import { explain } from "./notice.js";
import { askJson } from "./server.js";
import { say } from "./text.js";

export class KeyDialog {
  /** @param onChange called when keys have changed, with whether the admin key is good. */
  constructor(onChange) {
    this.onChange = onChange;
    byId("open-keys").addEventListener("click", () => this.#open());
    byId("cancel-keys").addEventListener("click", () => byId("key-dialog").close());
    byId("forget-keys").addEventListener("click", () => this.#forget());
    byId("key-form").addEventListener("submit", (event) => {
      event.preventDefault();
      this.#use();
    });
  }

  #open() {
    byId("api-key").value = keyOf("api");
    byId("admin-key").value = keyOf("admin");
    byId("key-trouble").textContent = "";
    byId("key-dialog").showModal();
  }

  async #use() {
    keepKey("api", byId("api-key").value.trim());
    keepKey("admin", byId("admin-key").value.trim());
    const trouble = keyOf("admin") ? await tryAdminKey() : null;
    if (trouble) {
      keepKey("admin", "");
      byId("key-trouble").textContent = trouble;
    } else {
      byId("key-dialog").close();
    }
    this.onChange(Boolean(keyOf("admin")));
  }

  #forget() {
    keepKey("api", "");
    keepKey("admin", "");
    byId("key-dialog").close();
    this.onChange(false);
  }
}

/** What is wrong with the admin key; null: nothing. */
export async function tryAdminKey() {
  try {
    await askJson("admin/status");
  } catch (error) {
    return error.status === 404 || error.status === 401 ? say("admin_key_refused") : explain(error);
  }
  return null;
}
