"""Recipe ``lm chat``: a conversation with a trained model."""

from moxe_plugin.train.chat.config import LMChatConfig as LMChatConfig
from moxe_plugin.train.chat.recipe import LMChatRecipe as LMChatRecipe
